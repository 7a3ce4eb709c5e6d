"""`import quantailor.hf` teaches transformers to load quantailor's own layout through `AutoModel...from_pretrained`.

Folders in compressed-tensors layout need no such import.
"""

from quantailor.formats.plugin import register

register()
