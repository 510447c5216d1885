"""What the gateway, metering and billing must agree on: standard library and msgspec only, no settings, no I/O."""
