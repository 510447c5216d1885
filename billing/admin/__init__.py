"""The back office of finance and operators. Registration is in `registration.py`, so that settings may import
`unfold_settings` before there is an app registry."""
