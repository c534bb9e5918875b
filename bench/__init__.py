"""Speed and memory of din_fast beside the units that it replaces: ``python -m bench --quick``."""
