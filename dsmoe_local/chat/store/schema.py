"""The tables of the session database, as migrations. A released migration is never changed.

Turns form trees: a turn has a parent, and a session has a head, whose ancestors are the turns that it shows.
Undo moves the head, a regenerated reply is a sibling, and a fork is a second session in the same tree. None
of these operations changes or deletes a turn. An unfinished reply is stored as the session's draft.

SQLite accepts any type in any column, so constraints check the types on writing. The file may get damaged, so
`records` validates rows on reading, and compares them with a digest in each row (`seal`).
"""

from __future__ import annotations

APPLICATION_ID = 0x64736D65  # "dsme": identifies a database of dsmoe-local


def _column(name: str, kind: str, more: str = "", rule: str = "") -> str:
    """Return the definition of a column with a fixed type. If `more` begins with NULL, values may be NULL."""
    optional = more.startswith("NULL")
    types = (
        f"typeof({name}) IN ('{kind.lower()}', 'null')" if optional else f"typeof({name}) = '{kind.lower()}'"
    )
    return f"{name} {kind} {more or 'NOT NULL'} CHECK ({types}{f' AND {rule}' if rule else ''})"


# GLOB ignores what follows a NUL, hence the length.
_STATE_FILE = f"file GLOB '{'[0-9a-f]' * 16}.state' AND length(CAST(file AS BLOB)) = 22"

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        # Numbers are never reused: an old state file or an open chat may still refer to one.
        f"""CREATE TABLE session (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            {_column("name", "TEXT")},
            {_column("key", "TEXT", "NOT NULL UNIQUE")},    -- the name as it is compared
            {_column("tree", "INTEGER")},       -- the number of the tree's first session
            {_column("head", "INTEGER", "NULL REFERENCES turn (id)")},
            {_column("revision", "INTEGER")},   -- counts the changes of this row
            {_column("system", "TEXT")},
            {_column("n_left_out", "INTEGER", rule="n_left_out >= 0")},
            {_column("n_shifted", "INTEGER", rule="n_shifted >= 0")},
            {_column("title", "TEXT")},
            {_column("model", "TEXT")},
            {_column("created", "REAL")},       -- seconds since 1970, as all times
            {_column("updated", "REAL")}
        )""",
        "CREATE INDEX session_tree ON session (tree)",
        "CREATE INDEX session_head ON session (head)",
        f"""CREATE TABLE turn (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            {_column("parent", "INTEGER", "NULL REFERENCES turn (id)")},
            {_column("tree", "INTEGER")},
            {_column("writer", "INTEGER")},     -- the session that added it, which may be gone
            {_column("depth", "INTEGER", rule="(depth = 1) = (parent IS NULL)")},   -- 1 without a parent
            {_column("role", "TEXT")},
            {_column("content", "TEXT")},
            {_column("token_ids", "BLOB", "NULL")},     -- 32 bits each, little-endian
            {_column("vocabulary", "TEXT", "NULL")},    -- of the token ids
            {_column("ending", "TEXT", "NULL")},
            {_column("usage", "TEXT", "NULL")},
            {_column("created", "REAL")}
        )""",
        "CREATE INDEX turn_parent ON turn (parent)",
        "CREATE INDEX turn_tree ON turn (tree)",
        # The content of turns, as `search.indexed` returns it, by turn id.
        """CREATE VIRTUAL TABLE search_index
           USING fts5 (content, tokenize = 'unicode61 remove_diacritics 2')""",
        # A path instead of a name would refer to files elsewhere.
        f"""CREATE TABLE state (
            {_column("file", "TEXT", "PRIMARY KEY", _STATE_FILE)},
            {_column("session", "INTEGER", "NOT NULL REFERENCES session (number) ON DELETE CASCADE")},
            {_column("fingerprint", "TEXT")},
            {_column("token_ids", "BLOB")},
            {_column("n_bytes", "INTEGER", rule="n_bytes >= 0")},
            {_column("digest", "BLOB", rule="length(digest) = 32")},
            {_column("used", "REAL")}
        )""",
        "CREATE INDEX state_session ON state (session)",
    ),
    (
        # The last of the turns that /redo restores. They follow the head.
        f"ALTER TABLE session ADD COLUMN {_column('undone', 'INTEGER', 'NULL REFERENCES turn (id)')}",
        "CREATE INDEX session_undone ON session (undone)",
        # The model's file, and the settings that /set changed, as JSON.
        f"ALTER TABLE session ADD COLUMN {_column('model_path', 'TEXT', 'NULL')}",
        f"ALTER TABLE session ADD COLUMN {_column('settings', 'TEXT', 'NULL')}",
        # Digests of rows, which detect damaged values that are valid. NULL in older rows.
        f"ALTER TABLE turn ADD COLUMN {_column('seal', 'BLOB', 'NULL')}",
        f"ALTER TABLE session ADD COLUMN {_column('seal', 'BLOB', 'NULL')}",
        # The number of write transactions: see `database.Tally`.
        f"CREATE TABLE tally ({_column('n_writes', 'INTEGER')})",
        "INSERT INTO tally VALUES (0)",
        # A state is now that of a block of tokens, identified by a digest of all tokens up to its end.
        "DROP TABLE state",
        f"""CREATE TABLE state (
            {_column("file", "TEXT", "PRIMARY KEY", _STATE_FILE)},
            {_column("session", "INTEGER", "NOT NULL REFERENCES session (number) ON DELETE CASCADE")},
            {_column("fingerprint", "TEXT")},
            {_column("prefix", "BLOB", rule="length(prefix) = 32")},
            {_column("n_tokens", "INTEGER", rule="n_tokens > 0")},      -- up to the end of the block
            {_column("n_bytes", "INTEGER", rule="n_bytes >= 0")},
            {_column("digest", "BLOB", rule="length(digest) = 32")},
            {_column("used", "REAL")}
        )""",
        "CREATE INDEX state_session ON state (session)",
        # The unfinished reply to the head.
        f"""CREATE TABLE draft (
            session INTEGER PRIMARY KEY REFERENCES session (number) ON DELETE CASCADE,
            {_column("role", "TEXT")},
            {_column("content", "TEXT")},
            {_column("token_ids", "BLOB", "NULL")},
            {_column("vocabulary", "TEXT", "NULL")},
            {_column("ending", "TEXT", "NULL")},
            {_column("usage", "TEXT", "NULL")},
            {_column("seal", "BLOB", "NULL")}
        )""",
    ),
    (
        # What a reasoning model wrote before the content.
        f"ALTER TABLE turn ADD COLUMN {_column('reasoning', 'TEXT', 'NULL')}",
        f"ALTER TABLE draft ADD COLUMN {_column('reasoning', 'TEXT', 'NULL')}",
    ),
)
