"""quantailor fits Transformers to fewer bits, and proves what it did.

import quantailor as qt
model = qt.quantize("path/to/model", "w4a16-g32", method="gptq", data="calib.txt")
"""

__version__ = "0.1.0"
