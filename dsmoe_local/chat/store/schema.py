"""The tables of the session database, as steps that are only ever added to.

Turns form trees. A turn names its parent; a session names its head, and is the way from there up to a turn
without a parent. Undo moves the head, another reply is a sibling, a fork is a second session in the same
tree: none of them changes a turn or takes one away.
"""

from __future__ import annotations

APPLICATION_ID = 0x64736D65  # "dsme": a database of somebody else is not taken for ours

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        # Numbers are never given twice: an old state file or a chat that is still open may name one.
        """CREATE TABLE session (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            name TEXT NOT NULL,
            key TEXT NOT NULL UNIQUE,       -- the name as it is compared
            tree INTEGER NOT NULL,          -- the number of the session that it all began with
            head INTEGER REFERENCES turn (id),
            revision INTEGER NOT NULL,      -- counts the changes of what follows and of the head
            system TEXT NOT NULL,
            n_left_out INTEGER NOT NULL,
            n_shifted INTEGER NOT NULL,
            title TEXT NOT NULL,
            model TEXT NOT NULL,
            created REAL NOT NULL,          -- seconds since 1970, as all times
            updated REAL NOT NULL
        )""",
        "CREATE INDEX session_tree ON session (tree)",
        "CREATE INDEX session_head ON session (head)",
        """CREATE TABLE turn (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            parent INTEGER REFERENCES turn (id),
            tree INTEGER NOT NULL,
            writer INTEGER NOT NULL,        -- the session that added it, which may be gone
            depth INTEGER NOT NULL,         -- 1 without a parent
            role TEXT NOT NULL,
            content TEXT NOT NULL,
            token_ids BLOB,                 -- 32 bits each, little-endian
            vocabulary TEXT,                -- of the token ids
            ending TEXT,
            usage TEXT,
            created REAL NOT NULL
        )""",
        "CREATE INDEX turn_parent ON turn (parent)",
        "CREATE INDEX turn_tree ON turn (tree)",
        # What `words.indexed` makes of a turn's content, by its id.
        """CREATE VIRTUAL TABLE search_index
           USING fts5 (content, tokenize = 'unicode61 remove_diacritics 2')""",
        """CREATE TABLE state (
            file TEXT PRIMARY KEY,
            session INTEGER NOT NULL REFERENCES session (number) ON DELETE CASCADE,
            fingerprint TEXT NOT NULL,
            token_ids BLOB NOT NULL,
            n_bytes INTEGER NOT NULL,
            digest BLOB NOT NULL,
            used REAL NOT NULL
        )""",
        "CREATE INDEX state_session ON state (session)",
    ),
)
