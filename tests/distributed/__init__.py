"""Tests on several processes: `make test-distributed`."""
