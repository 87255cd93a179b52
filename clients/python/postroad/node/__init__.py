"""Generated from proto/postroad/node by `make proto`; do not edit."""
