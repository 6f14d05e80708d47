"""Text for calibration and evaluation, and the token windows cut from it."""
