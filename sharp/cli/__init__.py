"""The parts of the command line that outgrew sharp/__main__.py. Nothing here is imported by the engine."""
