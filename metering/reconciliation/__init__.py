"""What providers say they served: their usage reports read into one form, and compared with our events."""
