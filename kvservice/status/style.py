"""The page's style: light and dark as the reader's system is, one column on a phone."""

from __future__ import annotations

STYLE = """
:root{--paper:#fff;--card:#f5f6f8;--ink:#1b1f24;--soft:#59636e;--line:#d8dde3;
--dram:#1f6feb;--nvme:#8250df;--miss:#d4a72c;--good:#1a7f37;--warn:#9a6700;--bad:#cf222e}
@media (prefers-color-scheme:dark){:root{--paper:#0f1318;--card:#181e26;--ink:#e6ebf1;--soft:#9aa6b2;--line:#2c343e;
--dram:#4f94f7;--nvme:#a97bf0;--miss:#c69026;--good:#4cc56f;--warn:#d8a634;--bad:#ff7b72}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.45 system-ui,sans-serif}
main{max-width:960px;margin:0 auto;padding:16px}
header{display:flex;flex-wrap:wrap;gap:4px 12px;align-items:baseline;color:var(--soft)}
h1{font-size:22px;margin:0;color:var(--ink)}h2{font-size:16px;margin:24px 0 8px}
.state{font-weight:600}.state.good{color:var(--good)}.state.warn{color:var(--warn)}.state.bad{color:var(--bad)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin-top:14px}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 12px}
.about{color:var(--soft);font-size:13px}.figure{font-size:26px;font-weight:650;font-variant-numeric:tabular-nums}
svg{display:block;width:100%;height:120px;background:var(--card);border:1px solid var(--line)}
svg line{stroke:var(--line)}rect.dram,i.dram{fill:var(--dram);background:var(--dram)}
rect.nvme,i.nvme{fill:var(--nvme);background:var(--nvme)}rect.miss,i.miss{fill:var(--miss);background:var(--miss)}
.axis{display:flex;justify-content:space-between;color:var(--soft);font-size:12px}
.legend{display:flex;flex-wrap:wrap;gap:2px 18px;margin-top:6px;font-size:13px}
.legend i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:6px}
table{width:100%;border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:5px 8px;border-bottom:1px solid var(--line);overflow-wrap:anywhere}
th{color:var(--soft);font-weight:500;font-size:13px}.number{text-align:right;white-space:nowrap}
meter{width:100%;min-width:80px}code{font-size:13px}p{color:var(--soft);margin:4px 0}
footer{margin:28px 0 8px;color:var(--soft);font-size:13px}a{color:var(--dram)}
@media (max-width:600px){thead{display:none}tr{display:block;padding:6px 0;border-bottom:1px solid var(--line)}
td,td.number{display:flex;justify-content:space-between;gap:16px;border:0;padding:2px 4px;text-align:right;
white-space:normal}td::before{content:attr(data-title);color:var(--soft);text-align:left;white-space:nowrap}
td meter{width:100%}td[data-title=""]::before{content:none}}
""".replace("\n", "")
