"""``triptych manifest``: manifests to and from other systems' formats."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.console import err, out
from flows.options import ConfigFile, InWorkspace, Preset, Set, settings_of
from schemas.config import TriptychConfig
from schemas.errors import ConfigError, InputError
from schemas.layout import Snapshot, Workspace
from schemas.storage import latest, read_done

if TYPE_CHECKING:
    from curation.formats.collection import Collection
    from curation.formats.official_export import Written


class Format(StrEnum):
    """What a manifest can be written as."""

    PRETRAIN_CSV = "pretrain-csv"
    SFT_JSON = "sft-json"
    WEBDATASET = "webdataset"
    HUGGINGFACE = "huggingface"


class ListFormat(StrEnum):
    """What a manifest can be read from."""

    PRETRAIN_CSV = "pretrain-csv"
    SFT_JSON = "sft-json"


class Kind(StrEnum):
    """Kinds of manifests."""

    SFT = "sft"
    PRETRAIN = "pretrain"


class Split(StrEnum):
    """Parts of a manifest."""

    TRAIN = "train"
    VAL = "val"
    TEST = "test"
    ALL = "all"


manifest = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Write manifests for other programs, and read theirs.",
)


@manifest.command("export")
def export_manifest(
    format: Annotated[Format, typer.Argument(help="What to write; see above.")],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="The file (first two) or folder to write.")
    ],
    kind: Annotated[
        Kind | None,
        typer.Option(help="webdataset: which manifest; default sft. Others follow from FORMAT."),
    ] = None,
    split: Annotated[
        Split | None,
        typer.Option(
            help="Which samples. Default: train for the trainer's lists, all for folders, which "
            "keep splits apart."
        ),
    ] = None,
    snapshot: Annotated[
        str | None, typer.Option(help="Snapshot id; default: the newest of the dataset.")
    ] = None,
    manifest_file: Annotated[
        Path | None,
        typer.Option("--manifest", help="An imported manifest instead of a snapshot's."),
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(help="Trainer's lists: paths are relative to this folder; default absolute."),
    ] = None,
    max_samples: Annotated[
        int, typer.Option(min=1, help="webdataset: most samples in a shard.")
    ] = 1000,
    max_shard_mb: Annotated[
        int, typer.Option(min=1, help="webdataset: largest shard in MB (10^6 bytes).")
    ] = 1000,
    with_videos: Annotated[
        bool, typer.Option("--with-videos", help="huggingface: copy the clips into the folder.")
    ] = False,
    config: ConfigFile = None,
    preset: Preset = "tiny",
    set_: Set = None,
    workspace: InWorkspace = None,
) -> None:
    """Write a snapshot's manifest for another program.

    [bold]pretrain-csv[/bold] and [bold]sft-json[/bold]: the lists of Mask²DiT's published trainer.
    It reads one file per clip and paths as they are; what is ours in the lists it does not look at,
    and [bold]triptych manifest import[/bold] reads it back.

    [bold]webdataset[/bold]: tar shards of whole samples, a folder per split, with an index.

    [bold]huggingface[/bold]: a folder for datasets.load_dataset: Parquet per split, both manifests
    as configs, and a dataset card.

    All but huggingface without --with-videos need clips as files of their own:

        triptych refresh -s curation.export.mode=reencode

        triptych manifest export sft-json sft.json
    """
    settings = settings_of(config, preset, set_, workspace)
    _check_options(format, kind, split, root, with_videos)
    data = _collection(settings, snapshot, manifest_file)
    default = Split.TRAIN if format in tuple(ListFormat) else Split.ALL
    chosen = None if (split or default) is Split.ALL else str(split or default)
    written = _write(
        data, format, target, str(kind or Kind.SFT), chosen, root, (max_samples, max_shard_mb),
        with_videos, settings,
    )  # fmt: skip
    counts = ", ".join(f"{n} {name}" for name, n in written.samples.items())
    out.print(f"samples: {counts}; clips: {written.clips}", highlight=False)
    if chosen is not None:
        err.print(f"Only split {chosen!r} was written; --split all writes every sample.")
    for path in written.files:
        out.print(f"wrote: {path}", soft_wrap=True, highlight=False)


def _write(
    data: Collection,
    format: Format,
    target: Path,
    kind: str,
    split: str | None,
    root: Path | None,
    shard: tuple[int, int],
    with_videos: bool,
    settings: TriptychConfig,
) -> Written:
    from curation.formats.hf_folder import write_hf_folder
    from curation.formats.official_export import write_pretrain_csv, write_sft_json
    from curation.formats.webdataset import ShardLimits, write_webdataset

    match format:
        case Format.PRETRAIN_CSV:
            return write_pretrain_csv(data, target, split=split, root=root)
        case Format.SFT_JSON:
            return write_sft_json(data, target, split=split, root=root)
        case Format.WEBDATASET:
            limits = ShardLimits(shard[0], shard[1] * 1_000_000)
            return write_webdataset(data, kind, target, limits, split=split)
        case Format.HUGGINGFACE:
            title = settings.curation.dataset
            return write_hf_folder(data, target, title=title, with_videos=with_videos)


def _check_options(
    format: Format, kind: Kind | None, split: Split | None, root: Path | None, with_videos: bool
) -> None:
    """Refuse what would mean nothing rather than pass over it."""
    implied = {Format.PRETRAIN_CSV: Kind.PRETRAIN, Format.SFT_JSON: Kind.SFT}.get(format)
    faults = {
        "--kind": kind is not None and format is not Format.WEBDATASET and kind is not implied,
        "--split": split not in (None, Split.ALL) and format is Format.HUGGINGFACE,
        "--root": root is not None and implied is None,
        "--with-videos": with_videos and format is not Format.HUGGINGFACE,
    }
    wrong = [name for name, fault in faults.items() if fault]
    if wrong:
        raise ConfigError(
            f"{', '.join(wrong)} does not go with this format",
            where=f"triptych manifest export {format}",
            do="leave it out; --help says what each format takes",
        )


def _collection(
    settings: TriptychConfig, snapshot: str | None, manifest_file: Path | None
) -> Collection:
    from curation.formats.collection import Collection

    if manifest_file is not None:
        if snapshot is not None:
            raise ConfigError("give --snapshot or --manifest, not both")
        return Collection.of_manifest(manifest_file)
    dataset = Workspace(Path(settings.workspace).absolute()).dataset(settings.curation.dataset)
    folder = latest(dataset) if snapshot is None else dataset / snapshot
    if folder is None or read_done(folder) is None:
        known = sorted(p.name for p in dataset.glob("[!.]*") if read_done(p) is not None)
        raise InputError(
            "there is no such finished snapshot",
            where=dataset,
            found=", ".join(known) or "no snapshots",
            expected=snapshot or "a snapshot that LATEST names",
            do="run `triptych refresh`, or give --workspace and curation.dataset",
        )
    return Collection.of_snapshot(Snapshot(folder))


@manifest.command("import")
def import_manifest(
    format: Annotated[ListFormat, typer.Argument(help="What FILE is.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The list.")],
    target: Annotated[
        Path, typer.Argument(metavar="OUT.parquet", help="The manifest to write (Parquet).")
    ],
    root: Annotated[
        Path | None, typer.Option(help="Folder of relative paths; default: the list's own.")
    ] = None,
    whole_files: Annotated[
        bool,
        typer.Option(
            "--whole-files",
            help="Take a list of ours as one written elsewhere: scenes are the clips' files, not "
            "spans of the sources.",
        ),
    ] = False,
    config: ConfigFile = None,
    preset: Preset = "tiny",
    set_: Set = None,
    workspace: InWorkspace = None,
) -> None:
    """Read a list of Mask²DiT's published trainer as a manifest.

    A list that [bold]triptych manifest export[/bold] wrote gives back its samples exactly; edited
    captions count. Of other lists every file is decoded, and samples are made as the trainer would:
    sft-json: all runs of N consecutive values of a group; pretrain-csv: N clips drawn at random
    (keys: curation.windows.scenes_per_sample, curation.manifests.seed, …, training.model.frames).

    Beside OUT.parquet, OUT.exports.parquet lists the clips' files and OUT.rejects.parquet what
    could not be used, with reasons.

        triptych manifest import sft-json sft.json sft.parquet -p cogvideox_5b
    """
    from curation.formats.official_import import import_list, rejects_beside

    settings = settings_of(config, preset, set_, workspace)
    if target.suffix != ".parquet":
        raise ConfigError("a manifest is a Parquet file", found=target, expected="OUT.parquet")
    found = import_list(format.value, file, target, settings, root=root, whole_files=whole_files)
    out.print(
        f"samples: {found.samples}; clips: {found.clips}; restored: {found.restored}; "
        f"measured: {found.measured}; left out: {len(found.rejects)}",
        highlight=False,
    )
    if found.corrected:
        err.print(f"{found.corrected} rows gave another number of frames than their file has.")
    for path in (target, *((rejects_beside(target),) if found.rejects else ())):
        out.print(f"wrote: {path}", soft_wrap=True, highlight=False)
