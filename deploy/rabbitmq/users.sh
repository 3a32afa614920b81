#!/bin/sh
# Make the broker's users, or give them their present passwords and rights again; may be repeated.
#
# Reads RABBITMQ_NODE (the node's name), RABBITMQ_OPERATOR_PASSWORD, and for each user of the file
# `rights` RABBITMQ_<USER>_PASSWORD. Passwords go through standard input: arguments can be listed.
set -eu

control() {
    rabbitmqctl --quiet --node "$RABBITMQ_NODE" "$@"
}

password_of() {
    name="RABBITMQ_$(echo "$1" | tr '[:lower:]' '[:upper:]')_PASSWORD"
    eval "password=\${$name:-}"
    if [ -z "$password" ]; then
        echo "$name is missing: set it in the environment of this step" >&2
        exit 1
    fi
    printf '%s\n' "$password"
}

ensure_user() {
    password="$(password_of "$1")"
    if control list_users | cut -f 1 | grep -qx "$1"; then
        printf '%s\n' "$password" | control change_password "$1"
    else
        printf '%s\n' "$password" | control add_user "$1"
    fi
}

ensure_user operator
control set_user_tags operator administrator
control set_permissions --vhost / operator '.*' '.*' '.*'

while read -r user configure write read <&3; do
    case "$user" in '#'*) continue ;; esac
    ensure_user "$user"
    control set_permissions --vhost / "$user" "$configure" "$write" "$read"
done 3<"$(dirname "$0")/rights"
