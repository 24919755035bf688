"""Numbers of a long run: each is on the disk as soon as it is known, and a run that was cut off goes on after it."""

from pathlib import Path

from cratelab.record import provenance
from cratelab.storage import finite, read_json, write_json


class Results:
    """One JSON file of provenance and of rows by name, replaced whole with each row."""

    def __init__(self, path: str | Path, **facts):
        """Begin the file, or go on with the one that is there.

        Args:
            path: of the file; made with the first row.
            facts: what makes rows comparable besides commit, torch and device, such as a recipe.

        Raises:
            ValueError: the file's rows were made otherwise.
        """
        self.path, now = Path(path), finite(provenance(**facts))
        self.content = read_json(path) if self.path.is_file() else {"provenance": now, "rows": {}}
        before = self.content.get("provenance") or {}
        for name in "commit", "torch", "device", *facts:
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
