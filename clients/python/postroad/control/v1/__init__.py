"""Generated from proto/postroad/control/v1 by `make proto`; do not edit."""
