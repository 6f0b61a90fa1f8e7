"""nvme: checksummed extents in segment files, and the journal that finds them after a restart."""

from kvservice.nvme.files import Files, RealFiles
from kvservice.nvme.format import RecordKind, record, records_array
from kvservice.nvme.results import ReadResult, Recovered, SegmentUse
from kvservice.nvme.volume import PLACE_BITS, Volume

__all__ = [
    "PLACE_BITS",
    "Files",
    "ReadResult",
    "RealFiles",
    "RecordKind",
    "Recovered",
    "SegmentUse",
    "Volume",
    "record",
    "records_array",
]
