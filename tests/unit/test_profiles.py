"""Which registry is meant, and as whom: docs/command-line.md, "Which registry"."""

from pathlib import Path

import pytest

from kamado.profiles import DEFAULT_URL, ProfileError, Target, check_url, profiles_file, read_profiles, resolve

TEXT = """
[default]
url = "https://one.example/"
username = "alice"
password_file = "alice.password"
ca_file = "/etc/ca.pem"

[plant]
url = "https://plant.example:8443/registry"
username = "bob"
password = "geheim"
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    file = tmp_path / "profiles.toml"
    file.write_text(TEXT)
    file.chmod(0o600)
    return {"KAMADO_PROFILES": str(file)}


NOWHERE = {"KAMADO_PROFILES": "/nowhere/profiles.toml"}


def test_without_anything_it_is_the_registry_of_this_machine() -> None:
    assert resolve(NOWHERE) == Target(url=DEFAULT_URL, origin="the default")
    assert profiles_file({}).name == "profiles.toml"


def test_option_beats_environment_beats_profile_beats_default(environment: dict[str, str]) -> None:
    def origin(more: dict[str, str], url: str | None = None, profile: str | None = None) -> tuple[str, str]:
        target = resolve(environment | more, url=url, profile=profile)
        return target.url, target.origin

    assert origin({}) == ("https://one.example", "profile default")
    assert origin({"KAMADO_PROFILE": "plant"}) == ("https://plant.example:8443/registry", "profile plant")
    assert origin({"KAMADO_PROFILE": "plant"}, profile="default") == ("https://one.example", "profile default")
    assert origin({"KAMADO_URL": "http://b"}, profile="plant") == ("http://b", "KAMADO_URL")
    assert origin({"KAMADO_URL": "http://b"}, url="http://c") == ("http://c", "--url")
    assert origin({"KAMADO_URL": "", "KAMADO_PROFILE": ""}) == ("https://one.example", "profile default")


def test_login_of_a_profile(environment: dict[str, str], tmp_path: Path) -> None:
    target = resolve(environment)
    assert (target.username, target.password) == ("alice", None)
    assert target.password_file == tmp_path / "alice.password"
    assert target.ca_file == Path("/etc/ca.pem")
    target = resolve(environment, profile="plant")
    assert (target.username, target.password, target.password_file) == ("bob", "geheim", None)
    assert "geheim" not in repr(target)


def test_each_value_has_its_own_precedence(environment: dict[str, str]) -> None:
    target = resolve(environment | {"KAMADO_PASSWORD": "other"}, profile="plant")
    assert (target.username, target.password) == ("bob", "other")
    target = resolve(environment, profile="plant", password_file=Path("p"), ca_file=Path("c"))
    assert (target.password, target.password_file, target.ca_file) == (None, Path("p"), Path("c"))
    target = resolve(environment | {"KAMADO_USERNAME": "carol", "KAMADO_PASSWORD": "x"})
    assert (target.username, target.password, target.password_file) == ("carol", "x", None)


def test_password_of_a_profile_is_for_its_user_and_its_url_only(environment: dict[str, str]) -> None:
    target = resolve(environment, profile="plant", username="carol")
    assert (target.username, target.password, target.password_file) == ("carol", None, None)
    for elsewhere in (
        resolve(environment, profile="plant", url="https://other.example"),
        resolve(environment | {"KAMADO_URL": "https://other.example"}, profile="plant"),
    ):
        assert (elsewhere.username, elsewhere.password, elsewhere.ca_file) == (None, None, None)
    same = resolve(environment, profile="plant", url="https://plant.example:8443/registry/")
    assert same.password == "geheim"


def test_password_without_a_name(environment: dict[str, str]) -> None:
    assert resolve(NOWHERE | {"KAMADO_PASSWORD": "x"}).password is None
    with pytest.raises(ProfileError, match="--username"):
        resolve(NOWHERE, password_file=Path("p"))


def test_profile_that_is_not_there(environment: dict[str, str]) -> None:
    with pytest.raises(ProfileError, match="has no profile plnat; there are: default, plant"):
        resolve(environment, profile="plnat")
    with pytest.raises(ProfileError, match="has no profile plant"):
        resolve(NOWHERE | {"KAMADO_PROFILE": "plant"})


def test_file_with_a_password_that_others_may_read(environment: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "profiles.toml"
    file.chmod(0o640)
    with pytest.raises(ProfileError, match="chmod 600"):
        read_profiles(file)
    file.write_text('[default]\nurl = "http://a"\n')
    assert list(read_profiles(file)) == ["default"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[", "is no TOML"),
        ("url = 1", "must be a table"),
        ("[a]\ncolour = 'x'", "a.colour: there is no such member"),
        ("[a]\nurl = 1", "a.url: must be a text"),
        ("[a]\nusername = ''", "a.username: must be a text that is not empty"),
        ("[a]\nurl = 'ftp://x'", "a.url: a URL has the form"),
        ("[a]\npassword = 'x'\npassword_file = 'y'", "only one of them"),
        ("['a b']\nurl = 'http://a'", "the name of a profile"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "profiles.toml"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(ProfileError, match=words):
        read_profiles(file)


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="cannot be read"):
        read_profiles(tmp_path)
    file = tmp_path / "profiles.toml"
    file.write_bytes(b"\xff")
    with pytest.raises(ProfileError, match="is no TOML"):
        read_profiles(file)


@pytest.mark.parametrize("url", ["http://a", "https://a.example:8443", "http://[::1]:8080", "http://a/path"])
def test_urls(url: str) -> None:
    assert check_url(url) == check_url(url + "/") == url


@pytest.mark.parametrize(
    "url",
    ["", "a", "localhost:8080", "amqp://a", "http://", "http://a:x", "http://a:0", "http://a:99999", "http://a?x=1"],
)
def test_wrong_urls(url: str) -> None:
    with pytest.raises(ProfileError, match="has the form"):
        check_url(url)
    with pytest.raises(ProfileError, match="KAMADO_URL"):
        resolve(NOWHERE | {"KAMADO_URL": url or "x"})


def test_url_with_a_login() -> None:
    with pytest.raises(ProfileError, match="must not hold a login"):
        check_url("http://alice:geheim@a")
