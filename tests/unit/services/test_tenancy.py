"""Tokens, the teams file and its reload, and what the administration port demands."""

from __future__ import annotations

import asyncio
import hashlib
import os
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from ppod.errors import PermissionDenied, Unauthenticated
from ppod_models.configuration import ConfigError, parse_config
from ppod_services.core.callers import ANONYMOUS, Team
from ppod_services.core.config import ServiceConfig, TenancyConfig
from ppod_services.core.metrics import ServiceMetrics
from ppod_services.core.teams_file import ADMINISTRATOR, load_roster
from ppod_services.core.tenancy import Tenancy, main

RED, BLUE, OLD_RED, ROOT = "red-token", "blue-token", "old-red-token", "root-token"


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def bearer(token: str) -> tuple[tuple[str, str | bytes], ...]:
    return (("user-agent", "test"), ("authorization", f"Bearer {token}"))


def teams_file(path: Path, **changes: object) -> Path:
    values: dict[str, object] = {
        "teams": [
            {"name": "red", "token_sha256": [digest(OLD_RED), digest(RED)], "weight": 3, "tokens_per_s": 100},
            {"name": "blue", "token_sha256": [digest(BLUE)]},
        ],
        "administrators": [{"name": "ops", "token_sha256": [digest(ROOT)]}],
    }
    path.write_text(yaml.safe_dump({**values, **changes}))
    return path


def tenancy_of(path: Path) -> Tenancy:
    return Tenancy(TenancyConfig(teams_file=path, reload_s=0.01))


def test_tokens_name_their_teams(tmp_path: Path) -> None:
    tenancy = tenancy_of(teams_file(tmp_path / "teams.yaml"))
    red = Team("red", weight=3.0, tokens_per_s=100.0, part=0.75)
    assert tenancy.team(bearer(RED)) == red
    assert tenancy.team(bearer(OLD_RED)) == red
    assert tenancy.team((("authorization", f"bearer  {BLUE} "),)) == Team("blue", part=0.25)
    assert tenancy.administrator(bearer(ROOT)) is ADMINISTRATOR


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", RED),),
        (("authorization", f"Basic {RED}"),),
        (("authorization", b"Bearer red-token"),),
        (("authorization", "Bearer "),),
        (("authorization", f"Bearer {digest(RED)}"),),
        (("authorization", f"Bearer {RED}x"),),
        (("authorization", "Bearer \udce9"),),
    ],
)
def test_nothing_else_lets_anybody_in(tmp_path: Path, metadata: tuple[tuple[str, str | bytes], ...]) -> None:
    tenancy = tenancy_of(teams_file(tmp_path / "teams.yaml"))
    with pytest.raises(Unauthenticated):
        tenancy.team(metadata)
    with pytest.raises(Unauthenticated):
        tenancy.administrator(metadata)


def test_each_port_takes_its_own_kind_of_token(tmp_path: Path) -> None:
    tenancy = tenancy_of(teams_file(tmp_path / "teams.yaml"))
    with pytest.raises(PermissionDenied, match="red"):
        tenancy.administrator(bearer(RED))
    with pytest.raises(PermissionDenied):
        tenancy.team(bearer(ROOT))


def test_without_a_file_everybody_is_anonymous() -> None:
    tenancy = Tenancy(TenancyConfig())
    assert tenancy.team(()) is ANONYMOUS
    assert tenancy.administrator(()) is ANONYMOUS


def test_all_faults_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "teams.yaml"
    teams = [
        {"name": "Red Team", "token_sha256": [digest(RED)]},
        {"name": "blue", "token_sha256": ["cafe"], "weight": 0},
        {"name": "green", "token_sha256": [], "quota": 3},
    ]
    path.write_text(yaml.safe_dump({"teams": teams}))
    with pytest.raises(ConfigError) as caught:
        load_roster(path)
    assert {problem.split(":")[0] for problem in caught.value.problems} == {
        "teams.0.name",
        "teams.1.token_sha256.0",
        "teams.1.weight",
        "teams.2.token_sha256",
        "teams.2.quota",
    }


def test_names_and_tokens_belong_to_one_holder(tmp_path: Path) -> None:
    path = tmp_path / "teams.yaml"
    teams = [{"name": name, "token_sha256": [digest(RED)]} for name in ("red", "red", "anonymous")]
    path.write_text(yaml.safe_dump({"teams": teams}))
    with pytest.raises(ConfigError) as caught:
        load_roster(path)
    [problem] = caught.value.problems
    for part in ("red is there twice", "anonymous is a name", f"token {digest(RED)[:8]}... is there twice"):
        assert part in problem


async def changed(tenancy: Tenancy, path: Path) -> None:
    """Let the watch see a change of the file."""
    watch = asyncio.create_task(tenancy.watch())
    await asyncio.sleep(0.15)
    watch.cancel()
    with suppress(asyncio.CancelledError):
        await watch
    assert path.name


@pytest.mark.parametrize(
    "content", [b"\xff\xfe teams", b"teams: 2001-13-45", b"[" * 2_000], ids=["bytes", "date", "depth"]
)
async def test_a_file_that_is_no_yaml_is_refused_and_the_next_one_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    path = teams_file(tmp_path / "teams.yaml")
    tenancy = tenancy_of(path)
    watch = asyncio.create_task(tenancy.watch())
    path.write_bytes(content)
    async with asyncio.timeout(10):
        while "teams_file_refused" not in [record.message for record in caplog.records]:
            assert not watch.done(), watch.exception()
            await asyncio.sleep(0.01)
        assert tenancy.team(bearer(RED)).name == "red"
        teams_file(path, teams=[{"name": "green", "token_sha256": [digest(RED)]}])
        while tenancy.team(bearer(RED)).name != "green":
            assert not watch.done(), watch.exception()
            await asyncio.sleep(0.01)
    watch.cancel()
    with suppress(asyncio.CancelledError):
        await watch


async def test_the_quotas_of_each_file_are_told(tmp_path: Path) -> None:
    path, metrics = teams_file(tmp_path / "teams.yaml"), ServiceMetrics()

    def quotas() -> dict[str, float]:
        [family] = [one for one in metrics.registry.collect() if one.name == "ppod_team_quota_tokens_per_second"]
        return {sample.labels["team"]: sample.value for sample in family.samples}

    tenancy = Tenancy(TenancyConfig(teams_file=path, reload_s=0.01), metrics.team_quotas)
    assert quotas() == {"red": 100.0}
    teams_file(path, teams=[{"name": "blue", "token_sha256": [digest(BLUE)], "tokens_per_s": 7.5}])
    await changed(tenancy, path)
    assert quotas() == {"blue": 7.5}


async def test_a_changed_file_is_taken_over_and_a_broken_one_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = teams_file(tmp_path / "teams.yaml")
    tenancy = tenancy_of(path)
    teams_file(path, teams=[{"name": "blue", "token_sha256": [digest(BLUE)], "weight": 5.0}])
    await changed(tenancy, path)
    assert tenancy.team(bearer(BLUE)).weight == 5
    with pytest.raises(Unauthenticated):
        tenancy.team(bearer(RED))
    for broken in ("teams: []", "teams: [", "nonsense: 1"):
        path.write_text(broken)
        await changed(tenancy, path)
        assert tenancy.team(bearer(BLUE)).weight == 5
    assert [record.message for record in caplog.records].count("teams_file_refused") == 3
    teams_file(path)
    await changed(tenancy, path)
    assert tenancy.team(bearer(RED)).name == "red"


async def test_a_missing_file_is_told_and_what_it_held_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As a Secret that somebody deleted, or mounted elsewhere: a pod that is started again does not come up."""
    path = teams_file(tmp_path / "teams.yaml")
    tenancy = tenancy_of(path)
    held = path.read_bytes()
    path.unlink()
    for _ in range(2):
        await changed(tenancy, path)
        assert tenancy.refused
        assert tenancy.team(bearer(RED)).name == "red"
    [told] = [record for record in caplog.records if record.message == "teams_file_refused"]
    assert "No such file" in str(vars(told))
    path.write_bytes(held)
    await changed(tenancy, path)
    assert not tenancy.refused


async def test_a_swapped_symlink_is_seen(tmp_path: Path) -> None:
    """As Kubernetes updates a mounted secret: the file's own path is a link through a folder that is swapped."""
    for name, weight in (("first", 1.0), ("second", 2.0)):
        (tmp_path / name).mkdir()
        teams_file(
            tmp_path / name / "teams.yaml", teams=[{"name": "red", "token_sha256": [digest(RED)], "weight": weight}]
        )
        os.utime(tmp_path / name / "teams.yaml", (1, 1))
    data = tmp_path / "..data"
    data.symlink_to("first")
    path = tmp_path / "teams.yaml"
    path.symlink_to("..data/teams.yaml")
    tenancy = tenancy_of(path)
    assert tenancy.team(bearer(RED)).weight == 1
    (tmp_path / "new").symlink_to("second")
    (tmp_path / "new").rename(data)
    await changed(tenancy, path)
    assert tenancy.team(bearer(RED)).weight == 2


def test_a_new_token_opens_the_door_that_its_snippet_describes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["new-token", "green"])
    printed = capsys.readouterr().out
    token = printed.splitlines()[1].removeprefix("# ")
    assert printed.count(token) == 1
    path = tmp_path / "teams.yaml"
    path.write_text("teams:\n" + printed)
    assert tenancy_of(path).team(bearer(token)).name == "green"
    main(["new-token", "green"])
    assert token not in capsys.readouterr().out
    # A name that YAML would read as a number.
    main(["new-token", "007"])
    printed = capsys.readouterr().out
    path.write_text("teams:\n" + printed)
    assert tenancy_of(path).team(bearer(printed.splitlines()[1].removeprefix("# "))).name == "007"


@pytest.mark.parametrize(
    ("name", "words"),
    [("Bad_NAME", "teams.0.name: String should match pattern"), ("anonymous", "a name that ppod uses itself")],
)
def test_no_token_is_made_for_a_name_that_the_file_may_not_hold(
    name: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["new-token", name])
    assert ended.value.code == 2
    output = capsys.readouterr()
    assert words in output.err
    assert output.out == ""


@pytest.mark.parametrize(
    ("values", "allowed"),
    [
        ({"listen": {"host": "127.0.0.1", "port": 1, "admin_port": 2}}, True),
        ({"listen": {"host": "::1", "port": 1, "admin_port": 2}}, True),
        ({"listen": {"host": "localhost", "port": 1, "admin_port": 2}}, True),
        ({"listen": {"host": "0.0.0.0", "port": 1}}, True),
        ({"listen": {"host": "0.0.0.0", "port": 1, "admin_port": 2}}, False),
        ({"listen": {"host": "reward.example.org", "port": 1, "admin_port": 2}}, False),
        ({"listen": {"host": "0.0.0.0", "port": 1, "admin_port": 2}, "tenancy": {"open_admin": True}}, True),
        ({"listen": {"host": "0.0.0.0", "port": 1, "admin_port": 2}, "tenancy": {"teams_file": "/t.yaml"}}, True),
        (
            {
                "listen": {"host": "0.0.0.0", "port": 1, "admin_port": 2},
                "tls": {"certificate_file": "/c", "private_key_file": "/k"},
            },
            False,
        ),
        (
            {
                "listen": {"host": "0.0.0.0", "port": 1, "admin_port": 2},
                "admin_tls": {"certificate_file": "/c", "private_key_file": "/k", "client_ca_file": "/a"},
            },
            True,
        ),
    ],
)
def test_administration_is_never_open_to_a_network_by_accident(values: object, *, allowed: bool) -> None:
    if allowed:
        parse_config(ServiceConfig, values, "test")
        return
    with pytest.raises(ConfigError, match=r"tenancy\.teams_file.*tenancy\.open_admin"):
        parse_config(ServiceConfig, values, "test")
