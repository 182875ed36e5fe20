"""Tasks of the common fields, one a file: each gives a `Task` with the field's metric, calibration data and loss."""
