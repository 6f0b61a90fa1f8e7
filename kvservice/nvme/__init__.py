"""nvme: checksummed extents in segment files, and the journal that finds them after a restart."""

from kvservice.nvme.counting import CountedFiles
from kvservice.nvme.files import Files, RealFiles
from kvservice.nvme.format import RecordKind, extent_stride_bytes, record, records_array
from kvservice.nvme.results import ReadJob, ReadResult, Recovered, RecoveredAlias, SegmentUse, WriteJob
from kvservice.nvme.segments import PLACE_BITS
from kvservice.nvme.survey import CheckedExtent, NamespaceContents, Survey
from kvservice.nvme.throttle import Throttle
from kvservice.nvme.volume import Volume

__all__ = [
    "PLACE_BITS",
    "CheckedExtent",
    "CountedFiles",
    "Files",
    "NamespaceContents",
    "ReadJob",
    "ReadResult",
    "RealFiles",
    "RecordKind",
    "Recovered",
    "RecoveredAlias",
    "SegmentUse",
    "Survey",
    "Throttle",
    "Volume",
    "WriteJob",
    "extent_stride_bytes",
    "record",
    "records_array",
]
