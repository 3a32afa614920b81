"""System packages: installed with apt-get after saying so; nothing is started or enabled."""

import os
import shutil
import subprocess
from collections.abc import Sequence

from sandbox.errors import InstallationFailedError

# One script, so that sudo asks once and all temporary changes are undone in any case.
#
# - policy-rc.d keeps Debian's maintainer scripts from starting services. Ours applies only while
#   this script runs, so even a SIGKILL leaves no rule behind; an existing one is restored.
# - Units and init scripts of the packages that were not there before are disabled again: RabbitMQ
#   brings epmd.socket and logrotate.timer beside its own service. deb-systemd-helper works with and
#   without a running systemd, and remembers it for upgrades; it wants to know a package's name.
# - A list that cannot be refreshed is not a failure: the existing one may suffice.
INSTALL = r"""
set -eu
policy=/usr/sbin/policy-rc.d
kept="$policy.kept-by-$$"
packages() { dpkg-query -W -f '${db:Status-Abbrev} ${Package}\n' | sed -n 's/^ii *//p'; }
leave_nothing_behind() {
    trap - EXIT HUP INT TERM
    set +e
    for package in $(packages | grep -vxF -e "$before"); do
        for file in $(dpkg -L "$package"); do
            name=${file##*/}
            case $file in
            */lib/systemd/system/*.service | */systemd/system/*.socket | */systemd/system/*.timer)
                DPKG_MAINTSCRIPT_PACKAGE="$package" deb-systemd-helper disable "$name" >/dev/null ;;
            /etc/init.d/*)
                update-rc.d "$name" disable >/dev/null ;;
            esac
        done
    done
    rm -f "$policy"
    if [ -e "$kept" ]; then mv "$kept" "$policy"; fi
}
before=$(packages)
trap leave_nothing_behind EXIT
trap 'exit 1' HUP INT TERM
if [ -e "$policy" ]; then mv "$policy" "$kept"; fi
printf '#!/bin/sh\nif kill -0 %s 2>/dev/null; then exit 101; fi\nexit 0\n' $$ >"$policy"
chmod 755 "$policy"

export DEBIAN_FRONTEND=noninteractive
apt-get update -q || echo "The package lists could not be refreshed; the existing ones are used."
apt-get install -q -y --no-install-recommends "$@"
"""


def way_to_root(
    *, effective_user_id: int, apt_get: bool, sudo: bool, unattended: bool
) -> list[str] | None:
    """Give the prefix of a command that installs packages, or None where none can be installed."""
    if not apt_get:
        return None
    if effective_user_id == 0:
        return []
    if not sudo:
        return None
    return ["sudo", "-n"] if unattended else ["sudo"]


def way_to_root_here() -> list[str] | None:
    return way_to_root(
        effective_user_id=os.geteuid(),
        apt_get=shutil.which("apt-get") is not None,
        sudo=shutil.which("sudo") is not None,
        unattended="CI" in os.environ,
    )


def install(packages: Sequence[str], why: str, prefix: Sequence[str]) -> None:
    """Install `packages`; raises InstallationFailedError after apt-get's own words."""
    manner = "sudo may ask for your password" if prefix else "as root"
    print(
        f"{why} Installing with apt-get ({manner}): {' '.join(packages)}."
        " Nothing of it is started or enabled in the system.",
        flush=True,
    )
    installed = subprocess.run([*prefix, "sh", "-c", INSTALL, "sh", *packages], check=False)
    if installed.returncode != 0:
        raise InstallationFailedError(
            f"apt-get could not install {' '.join(packages)} (exit {installed.returncode}, its"
            " words are above): install them by hand, then try again."
        )
