"""PTX as Python functions: one instruction family a file. Section names are those of the PTX ISA manual."""
