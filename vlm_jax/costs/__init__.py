"""What models cost. One place counts: the progress bar's MFU, `aot`, the planner and `errors.csv` all ask it."""
