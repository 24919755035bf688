"""Numbers of a long run: each is on the disk as soon as it is known, and a run that was cut off goes on after it."""

from pathlib import Path

from cratelab.provenance import provenance
from cratelab.storage import digest_of, digest_of_file, finite, read_json, write_json

ROOT = Path(__file__).parents[1]


class Results:
    """One JSON file of provenance and of rows by name, replaced whole with each row."""

    def __init__(self, path: str | Path, **facts):
        """Begin the file, or go on with the one that is there.

        Args:
            path: of the file; made with the first row.
            facts: what makes rows comparable besides code, torch and device, such as a recipe.

        Raises:
            ValueError: the file's rows were made otherwise.
        """
        files = [file for folder in ("cratelab", "benchmarks", "tests") for file in (ROOT / folder).rglob("*.py")]
        code = digest_of({str(file.relative_to(ROOT)): digest_of_file(file) for file in files})
        self.path, now = Path(path), finite(provenance(code=code, **facts))
        self.content = read_json(path) if self.path.is_file() else {"provenance": now, "rows": {}}
        before = self.content.get("provenance") or {}
        for name in "code", "torch", "device", *facts:
            if before.get(name) != now[name]:
                raise ValueError(
                    f"{path} holds other results ({name} was {before.get(name)}, now {now[name]}): "
                    "choose another folder, or remove the file"
                )

    @property
    def rows(self) -> dict[str, dict]:
        return self.content["rows"]

    def add(self, name: str, row: dict) -> None:
        self.rows[name] = row
        write_json(self.path, self.content)
