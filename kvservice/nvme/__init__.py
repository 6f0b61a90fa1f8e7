"""nvme: checksummed extents in segment files, and the journal that finds them after a restart."""

from kvservice.nvme.files import Files, RealFiles
from kvservice.nvme.format import RecordKind, record, records_array
from kvservice.nvme.results import ReadResult, Recovered
from kvservice.nvme.volume import Volume

__all__ = ["Files", "ReadResult", "RealFiles", "RecordKind", "Recovered", "Volume", "record", "records_array"]
