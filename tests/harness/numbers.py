"""Errors of results relative to expected values."""


def relative_error(result, expected) -> float:
    return ((result.double() - expected.double()).norm() / expected.double().norm()).item()
