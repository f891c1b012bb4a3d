"""Transformations of stacked task gradients that go before, around or after a surgery."""
