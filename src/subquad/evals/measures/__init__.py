"""The measurements of a `Suite`: each adds lines to its table and a section to its report."""
