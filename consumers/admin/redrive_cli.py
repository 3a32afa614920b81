"""`python -m consumers dead-letters redrive`, `... redrives list | show | pause | ...`"""

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import typer

from assistance.redrive import ItemState
from consumers.admin import redrive_job
from consumers.admin.cli import with_database
from consumers.admin.dead_letters import NOTHING, Group
from consumers.admin.redrive_job import (
    KnownDestinations,
    Planned,
    RedriveBusy,
    RedriveItem,
    RedriveLease,
    RedriveOperation,
)
from consumers.admin.redrive_runner import Redrive, RedriveOptions
from consumers.admin.selection_cli import (
    Code,
    Destination,
    GroupName,
    Ids,
    Reason,
    Since,
    Until,
    Yes,
    counted,
    not_all,
    selection,
)
from consumers.delivery.destinations import Destinations
from consumers.settings import RedriveSettings
from runtime.exit_codes import ExitCode
from runtime.mongo import Database
from runtime.settings import MongoSettings, load_settings
from runtime.shutdown import Stop
from runtime.terminal import (
    AsJson,
    Who,
    Why,
    confirm,
    fail,
    operator,
    print_if_cut,
    print_json,
    print_result,
    print_table,
    printable,
)

redrives = typer.Typer(no_args_is_help=True, help="Show, pause, resume and cancel redrives.")

#: Skipped letters named per reason.
NAMED_COUNT = 3

RedriveId = Annotated[str, typer.Argument(metavar="ID", help="as shown by `redrives list`")]


def redrive(
    context: typer.Context,
    ids: Ids = None,
    *,
    why: Why,
    who: Who,
    group: GroupName = None,
    destination: Destination = None,
    code: Code = None,
    reason: Reason = None,
    since: Since = None,
    until: Until = None,
    rate: Annotated[float, typer.Option(min=0.01, max=1000, help="letters per second")] = 10.0,
    stop_share: Annotated[
        float,
        typer.Option(min=0.01, max=1, help="pause when this share of the newest 20 failed"),
    ] = 0.5,
    patience_seconds: Annotated[
        float, typer.Option(min=0, help="pause after this long without any outcome")
    ] = 120.0,
    preview: Annotated[bool, typer.Option("--preview", help="print what would be sent")] = False,
    yes: Yes = False,
    json: AsJson = False,
) -> None:
    """
    Send failed deliveries again: one first and, once it succeeded, the rest at a rate.

    It pauses itself when deliveries fail again (exit code 1), and on Ctrl-C (75).
    """
    say = _say(json)
    chosen = not_all(selection(ids, group, destination, code, reason, since, until))
    asking = operator(who=who, why=why)
    settings = load_settings(RedriveSettings, "redrive")
    planned = with_database(
        settings,
        lambda database, _: redrive_job.plan(database, chosen, _destinations(database, settings)),
    )
    plan = _preview(planned, say)
    sendable = sum(plan["send"].values())
    if preview or not sendable:
        if not sendable:
            say("nothing to send")
        if json:
            print_json({"plan": plan, "redrive": None})
        return
    if not yes:
        confirm(f"send {counted(sendable, 'letter')}?")
    options = RedriveOptions(rate, stop_share, patience_seconds)

    async def run(database: Database, stop: Stop) -> _Ended:
        lease = await redrive_job.start(database, planned, chosen, asking, rate_per_second=rate)
        say(f"redrive {lease.redrive_id}")
        known = _destinations(database, settings)
        return await _run(context, database, lease, known, options, stop, say)

    _end(settings, run, plan=plan, json=json)


@redrives.command("list")
def list_redrives(*, limit: Annotated[int, typer.Option(min=1)] = 20, json: AsJson = False) -> None:
    """List the redrives, newest first."""
    settings = load_settings(MongoSettings, "dead-letters")
    found = with_database(settings, lambda database, _: redrive_job.newest(database, limit))
    if json:
        print_json(found)
        return
    fields = ("_id", "asked_at", "who", "why", "state", "reason")
    print_table(
        ("redrive", "started", "who", "why", "state", "reason", "result"),
        ([*(dict(one)[name] for name in fields), _as_text(one["result"] or {})] for one in found),
        if_empty="there are no redrives",
    )
    print_if_cut(found, limit)


@redrives.command("show")
def show_redrive(
    redrive_id: RedriveId,
    *,
    state: Annotated[ItemState | None, typer.Option(help="only letters in this state")] = None,
    limit: Annotated[int, typer.Option(min=1)] = 50,
    json: AsJson = False,
) -> None:
    """Show one redrive and the state of its letters."""

    async def read(
        database: Database, _stop: Stop
    ) -> tuple[RedriveOperation, dict[str, int], list[RedriveItem]]:
        found = await redrive_job.find(database, redrive_id)
        await redrive_job.observe(database, redrive_id)
        return (
            found,
            await redrive_job.counts(database, redrive_id),
            await redrive_job.items(database, redrive_id, state=state, limit=limit),
        )

    settings = load_settings(MongoSettings, "dead-letters")
    found, counts, items = with_database(settings, read)
    if json:
        print_json({**found, "counts": counts, "items": items})
        return
    for name in ("_id", "asked_at", "who", "why", "state", "reason", "rate_per_second"):
        typer.echo(f"{name:16} {printable(dict(found)[name])}")
    typer.echo(f"{'counts':16} {_as_text(counts)}")
    fields = ("letter", "state", "why", "code")
    print_table(
        fields,
        ([item.get(name) for name in fields] for item in items),
        if_empty=f"no letter is in the state {state.value}" if state else "it has no letters",
    )
    print_if_cut(items, limit)


@redrives.command()
def pause(redrive_id: RedriveId, *, why: Why, who: Who, json: AsJson = False) -> None:
    """Pause a redrive: it sends nothing more until it is resumed."""
    asking = operator(who=who, why=why)
    settings = load_settings(MongoSettings, "dead-letters")
    with_database(settings, lambda database, _: redrive_job.pause(database, redrive_id, asking))
    print_result({"redrive": redrive_id, "state": "paused"}, "paused", json=json)


@redrives.command()
def cancel(redrive_id: RedriveId, *, why: Why, who: Who, json: AsJson = False) -> None:
    """End a redrive: letters not sent stay dead letters, sent ones are delivered."""
    asking = operator(who=who, why=why)
    settings = load_settings(MongoSettings, "dead-letters")
    with_database(settings, lambda database, _: redrive_job.cancel(database, redrive_id, asking))
    print_result({"redrive": redrive_id, "state": "cancelled"}, "cancelled", json=json)


@redrives.command()
def resume(
    context: typer.Context,
    redrive_id: RedriveId,
    *,
    why: Why,
    who: Who,
    stop_share: Annotated[float, typer.Option(min=0.01, max=1)] = 0.5,
    patience_seconds: Annotated[float, typer.Option(min=0)] = 120.0,
    json: AsJson = False,
) -> None:
    """Resume a redrive that is paused or whose command died, again with one letter first."""
    asking = operator(who=who, why=why)
    settings = load_settings(RedriveSettings, "redrive")

    async def run(database: Database, stop: Stop) -> _Ended:
        lease = await redrive_job.resume(database, redrive_id, asking)
        options = RedriveOptions(lease.operation["rate_per_second"], stop_share, patience_seconds)
        known = _destinations(database, settings)
        return await _run(context, database, lease, known, options, stop, _say(json))

    _end(settings, run, plan=None, json=json)


@dataclass(frozen=True, slots=True)
class _Ended:
    """How the run of a redrive ended; stopped: by Ctrl-C or SIGTERM."""

    redrive_id: str
    state: str
    reason: str | None
    counts: Mapping[str, int]
    stopped: bool

    @property
    def exit_code(self) -> ExitCode:
        if self.state == redrive_job.State.DONE:
            return ExitCode.OK
        if self.state == redrive_job.State.PAUSED and not self.stopped:
            return ExitCode.FOUND
        return ExitCode.UNFINISHED


def _say(json: bool) -> Callable[[str], None]:
    """What is printed on the way; JSON has standard output to itself."""
    return partial(typer.echo, err=json)


async def _run(
    context: typer.Context,
    database: Database,
    lease: RedriveLease,
    destinations: KnownDestinations,
    options: RedriveOptions,
    stop: Stop,
    say: Callable[[str], None],
) -> _Ended:
    redrive_id = lease.redrive_id
    await Redrive(database, lease, destinations, options, stop, say).run()
    ended = await redrive_job.find(database, redrive_id)
    reason = f" ({ended['reason']})" if ended["reason"] else ""
    counts = await redrive_job.counts(database, redrive_id)
    say(f"{ended['state']}{printable(reason)}: {_as_text(counts)}")
    if ended["state"] == redrive_job.State.PAUSED:
        program = context.find_root().command_path
        say(f"resume with: {program} dead-letters redrives resume {redrive_id} --why ...")
    return _Ended(redrive_id, ended["state"], ended["reason"], counts, stop.requested)


def _end(
    settings: RedriveSettings,
    run: Callable[[Database, Stop], Awaitable[_Ended]],
    *,
    plan: Mapping[str, Any] | None,
    json: bool,
) -> None:
    try:
        ended = with_database(settings, run)
    except RedriveBusy as refusal:
        fail(
            f"refused: {printable(refusal, limit=1000)}; nothing was changed",
            ExitCode.NOTHING_DONE,
        )
    if json:
        print_json({"plan": plan, "redrive": ended})
    raise typer.Exit(ended.exit_code)


def _preview(planned: Sequence[Planned], say: Callable[[str], None]) -> dict[str, Any]:
    """
    Say what would be sent, and what skipped and why.

    Returns {"send": letters per group, "skip": IDs of letters per reason}.
    """
    to_send = Counter(str(Group.of(one.letter)) for one in planned if one.skip is None)
    for group, count in to_send.most_common():
        say(f"send {count}: {printable(group)}")
    skipped: dict[str, list[str]] = {}
    for one in planned:
        if one.skip is not None:
            skipped.setdefault(one.skip.value, []).append(one.letter["_id"])
    for why, ids in skipped.items():
        named = ", ".join(ids[:NAMED_COUNT]) + (", …" if len(ids) > NAMED_COUNT else "")
        say(f"skip {len(ids)}: {why} ({printable(named, limit=400)})")
    return {"send": to_send, "skip": skipped}


def _destinations(database: Database, settings: RedriveSettings) -> KnownDestinations:
    return KnownDestinations(frozenset(settings.destinations), Destinations(database).unavailable)


def _as_text(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{state} {count}" for state, count in counts.items()) or NOTHING
