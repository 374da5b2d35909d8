"""The page."""
from pathlib import Path
def write_page(root: Path) -> Path:
    return root
