"""Pictures of the engine's own objects, as HTML and SVG for a notebook. They read and change nothing."""
