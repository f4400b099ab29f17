"""pyarrow's compute functions. They are made at run time, where type checkers do not see them."""

from typing import Any

import pyarrow.compute

pc: Any = pyarrow.compute
