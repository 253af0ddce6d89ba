"""deploy/k8s, rendered once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.deploy.manifests import CERTIFICATE_FILES, DEPLOY, SECRETS, Manifests, render


@pytest.fixture(scope="session")
def kind_overlay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the overlay for kind, with secrets; what is in them does not matter here."""
    copied = tmp_path_factory.mktemp("deploy") / "k8s"
    ignored = shutil.ignore_patterns("secrets")
    shutil.copytree(DEPLOY / "k8s", copied, ignore=ignored)
    overlay = copied / "overlays" / "kind"
    for component in SECRETS:
        folder = overlay / "secrets" / component
        folder.mkdir(parents=True)
        for name in CERTIFICATE_FILES:
            (folder / name).write_text(f"{component}'s {name}\n")
    (overlay / "secrets" / "master-password").write_text("a password\n")
    return overlay


@pytest.fixture(scope="session")
def manifests(kind_overlay: Path) -> Manifests:
    """The overlay for kind: all of the base, and what it adds."""
    return render(kind_overlay)
