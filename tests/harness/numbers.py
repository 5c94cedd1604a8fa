"""How far results are from what is expected."""


def relative_error(result, expected) -> float:
    return ((result.double() - expected.double()).norm() / expected.double().norm()).item()
