"""An experiment's collected results: read from CSV, compared with their spread, drawn by ``prelora figures``."""
