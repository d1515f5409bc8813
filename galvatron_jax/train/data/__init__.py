"""Data: windows of tokens by index, put in one global order, batched for the rows that a process feeds.

Everything is indexed: batch ``k`` is the same for any number of processes, and where a run stands is one number.
"""

from ._loader import Loader as Loader
from ._open import open_windows as open_windows
from ._records import SkippedRecords as SkippedRecords
from ._windows import CorruptRecordError as CorruptRecordError
from ._windows import SampleWindows as SampleWindows
from ._windows import Windows as Windows
from ._windows import split_windows as split_windows
