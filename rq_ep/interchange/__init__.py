"""Files of other engines: their expert statistics read, their placements written. One format per file."""
