"""The tables of the session database, as steps that are only ever added to, from the first release on.

Turns form trees. A turn names its parent; a session names its head, and is the way from there up to a turn
without a parent. Undo moves the head, another reply is a sibling, a fork is a second session in the same
tree: none of them changes a turn or takes one away. A reply that is not finished is no turn yet, but its
session's draft.

Columns are checked as they are written, since SQLite takes any type in any column. What is read is checked
once more, by `rows`, against the seal that each row was given: a damaged file keeps no rule.
"""

from __future__ import annotations

APPLICATION_ID = 0x64736D65  # "dsme": a database of somebody else is not taken for ours


def _column(name: str, kind: str, more: str = "", rule: str = "") -> str:
    """A column whose values all have the type; or none, if `more` begins with NULL."""
    optional = more.startswith("NULL")
    types = (
        f"typeof({name}) IN ('{kind.lower()}', 'null')" if optional else f"typeof({name}) = '{kind.lower()}'"
    )
    return f"{name} {kind} {more or 'NOT NULL'} CHECK ({types}{f' AND {rule}' if rule else ''})"


# GLOB looks no further than a NUL.
_STATE_FILE = f"file GLOB '{'[0-9a-f]' * 16}.state' AND length(CAST(file AS BLOB)) = 22"

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        # Numbers are never given twice: an old state file or a chat that is still open may name one.
        f"""CREATE TABLE session (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            {_column("name", "TEXT")},
            {_column("key", "TEXT", "NOT NULL UNIQUE")},    -- the name as it is compared
            {_column("tree", "INTEGER")},       -- the number of the session that it all began with
            {_column("head", "INTEGER", "NULL REFERENCES turn (id)")},
            {_column("revision", "INTEGER")},   -- counts the changes of what follows and of the head
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
        # What `words.indexed` makes of a turn's content, by its id.
        """CREATE VIRTUAL TABLE search_index
           USING fts5 (content, tokenize = 'unicode61 remove_diacritics 2')""",
        # A name that is a path would reach files elsewhere.
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
        # What /redo brings back: the last turn of a branch that begins at the head.
        f"ALTER TABLE session ADD COLUMN {_column('undone', 'INTEGER', 'NULL REFERENCES turn (id)')}",
        "CREATE INDEX session_undone ON session (undone)",
        # What it was held with: the model's file, and what /set chose, as JSON.
        f"ALTER TABLE session ADD COLUMN {_column('model_path', 'TEXT', 'NULL')}",
        f"ALTER TABLE session ADD COLUMN {_column('settings', 'TEXT', 'NULL')}",
        # Digests of what rows say, since a damaged page may still make sense; none of a row from before.
        f"ALTER TABLE turn ADD COLUMN {_column('seal', 'BLOB', 'NULL')}",
        f"ALTER TABLE session ADD COLUMN {_column('seal', 'BLOB', 'NULL')}",
        # How many transactions have written to the database: see `database.Tally`.
        f"CREATE TABLE tally ({_column('n_writes', 'INTEGER')})",
        "INSERT INTO tally VALUES (0)",
        # A state is of a block of tokens now, known by a digest of all tokens up to its end.
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
        # The reply to the head that was being written when it was last saved.
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
)
