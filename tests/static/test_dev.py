"""The set-up that a developer's checkouts share."""

import dev


def test_an_environment_behind_a_link_is_the_same_one(tmp_path, monkeypatch):
    (tmp_path / "one" / "venv").mkdir(parents=True)
    (tmp_path / "two").symlink_to(tmp_path / "one")
    found = set()
    for folder in ("one", "two"):
        monkeypatch.setattr(dev, "VENV", tmp_path / folder / "venv")
        found.add(dev.fingerprint(["torch"]))
    assert len(found) == 1
