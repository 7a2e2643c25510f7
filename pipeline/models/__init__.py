"""Networks and their weights. Imports torch alone; timm only in ``backbones`` and ``weights``."""
