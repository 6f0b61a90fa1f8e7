"""nvme: checksummed extents in segment files, and the journal that finds them after a restart."""

from kvservice.nvme.files import Files, RealFiles
from kvservice.nvme.format import RecordKind
from kvservice.nvme.volume import ReadResult, Recovered, Volume, record, records_array

__all__ = ["Files", "ReadResult", "RealFiles", "RecordKind", "Recovered", "Volume", "record", "records_array"]
