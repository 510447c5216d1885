"""Pure metering: sequences, windows, attribution and sums. No clock, no database, no settings."""
