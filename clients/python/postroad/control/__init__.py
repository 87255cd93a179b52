"""Generated from proto/postroad/control by `make proto`; do not edit."""
