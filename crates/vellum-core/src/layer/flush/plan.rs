//! What a flush does: all of its decisions, in one function of plain values. docs/durability.md, "How
//! a flush works", has them as two tables, and the test below holds the function to these.

use crate::layer::journal::{JournalStatus, RecordBody, Standing, When};
use crate::layer::map_state::Written;
use vellum_base::block::Blocks;

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ask {
    /// A flush.
    Flush,
    /// A flush after which no block is in the journal alone.
    Barrier,
    /// A record ahead of a flush, which will make it durable.
    Ahead,
}

/// What was frozen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Work {
    /// Changes of the map that a record would have.
    pub(super) changes: usize,
    pub(super) written: Written,
}

impl Work {
    /// Bytes of the blocks that a record would carry.
    pub(super) fn carried_bytes(self) -> u64 {
        match self.written {
            Written::Few(blocks) => blocks.bytes(),
            Written::Nothing | Written::Many => 0,
        }
    }
}

/// What makes the bytes of blocks durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    /// The record carries them.
    Blocks,
    /// The data files, which were synced, also those of older records: it is a barrier.
    Barrier,
}

/// Where a record goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// Behind the one before.
    Here,
    /// To an area that is made for it.
    NewArea,
    /// To the other area, once that is free and the records here are durable.
    OtherArea,
}

/// What says that the frozen changes are the map's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Commit {
    /// There is nothing to say.
    Nothing,
    Record {
        content: Content,
        place: Place,
        when: When,
    },
    /// A checkpoint in the place of a record.
    Checkpoint,
}

/// The steps of a flush, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Plan {
    /// Sync the data files.
    pub(super) sync_data: bool,
    pub(super) commit: Commit,
    /// Sync the journal, where a record is not durable by itself.
    pub(super) sync_journal: bool,
}

impl Plan {
    /// Nothing to do.
    pub(super) const NOTHING: Plan = Plan {
        sync_data: false,
        commit: Commit::Nothing,
        sync_journal: false,
    };
}

/// Whether a flush has nothing to write: what is in the journal already is all there is.
pub(super) fn is_written(ask: Ask, work: Work, journal: &JournalStatus) -> bool {
    let unchanged = work.changes == 0 && work.written == Written::Nothing;
    unchanged && !(ask == Ask::Barrier && journal.carries)
}

/// Whether a record may carry what was written, if the reserve covers it.
pub(super) fn may_carry(ask: Ask, work: Work) -> bool {
    ask == Ask::Flush && work.written != Written::Many
}

/// Decides on all that a flush does. `covered`: after a power cut there would be space for what the
/// journal carries and for this; of interest only where a flush [`may_carry`].
pub(super) fn plan(ask: Ask, work: Work, journal: &JournalStatus, covered: bool) -> Plan {
    if ask == Ask::Ahead {
        return plan_ahead(work, journal);
    }
    let sync_journal = journal.has_unsynced;
    if is_written(ask, work, journal) {
        return Plan {
            sync_journal,
            ..Plan::NOTHING
        };
    }
    let (content, blocks) = match work.written {
        Written::Few(blocks) if may_carry(ask, work) && covered => (Content::Blocks, blocks),
        Written::Nothing if may_carry(ask, work) && covered => (Content::Blocks, Blocks::NONE),
        _ => (Content::Barrier, Blocks::NONE),
    };
    let sync_data = content == Content::Barrier;
    let says_nothing = work.changes == 0 && !journal.carries && journal.standing == Standing::Sound;
    if sync_data && says_nothing {
        return Plan {
            sync_data,
            commit: Commit::Nothing,
            sync_journal,
        };
    }
    let Some(place) = place(RecordBody::len_of(work.changes, blocks) as u64, journal) else {
        return Plan {
            sync_data,
            commit: Commit::Checkpoint,
            sync_journal: false,
        };
    };
    // Records behind which another generation begins are synced before.
    let behind_unsynced = place == Place::Here && journal.has_unsynced;
    let when = match behind_unsynced {
        true => When::Ahead,
        false => When::Durable,
    };
    Plan {
        sync_data,
        commit: Commit::Record {
            content,
            place,
            when,
        },
        sync_journal: behind_unsynced,
    }
}

/// A record ahead is one that needs neither a sync nor room to be made.
fn plan_ahead(work: Work, journal: &JournalStatus) -> Plan {
    let Written::Few(blocks) = work.written else {
        return Plan::NOTHING;
    };
    match place(RecordBody::len_of(work.changes, blocks) as u64, journal) {
        Some(Place::Here) => Plan {
            commit: Commit::Record {
                content: Content::Blocks,
                place: Place::Here,
                when: When::Ahead,
            },
            ..Plan::NOTHING
        },
        _ => Plan::NOTHING,
    }
}

/// Where a record of `len` bytes goes; `None` where a checkpoint takes its place.
fn place(len: u64, journal: &JournalStatus) -> Option<Place> {
    if journal.standing == Standing::Unknown || len > journal.longest {
        return None;
    }
    match journal.area {
        None => Some(Place::NewArea),
        Some(area) if journal.position + len <= area => Some(Place::Here),
        Some(_) if !journal.has_records => Some(Place::NewArea),
        Some(_) if journal.background => Some(Place::OtherArea),
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// The rows of the table in docs/durability.md whose head begins with `head`.
    fn table(head: &str) -> Vec<Vec<String>> {
        let docs = Path::new(env!("CARGO_MANIFEST_DIR"))
            .ancestors()
            .map(|dir| dir.join("docs/durability.md"))
            .find(|path| path.exists())
            .unwrap();
        let text = std::fs::read_to_string(docs).unwrap();
        let (_, section) = text.split_once("## How a flush works").unwrap();
        let lines = section.lines().skip_while(|line| !line.starts_with(head));
        let rows = lines.skip(2).take_while(|line| line.starts_with('|'));
        let cells = |line: &str| {
            line.trim_matches('|')
                .split('|')
                .map(|c| c.trim().into())
                .collect()
        };
        let rows: Vec<_> = rows.map(cells).collect();
        assert!(!rows.is_empty(), "no table {head}");
        rows
    }

    /// What the first row says that fits.
    fn look_up(table: &[Vec<String>], wanted: &[&str]) -> Vec<String> {
        let fits = |row: &&Vec<String>| {
            row.iter()
                .zip(wanted)
                .all(|(cell, want)| cell == "any" || cell.split(", ").any(|one| one == *want))
        };
        let row = table.iter().find(fits);
        row.unwrap_or_else(|| panic!("no row for {wanted:?}"))[wanted.len()..].to_vec()
    }

    fn yes(value: bool) -> &'static str {
        if value { "yes" } else { "no" }
    }

    struct Case {
        ask: Ask,
        work: Work,
        journal: JournalStatus,
        room: &'static str,
        covered: bool,
    }

    impl Case {
        fn of(ask: Ask, written: Written, changes: usize, room: &'static str, bits: u32) -> Self {
            let bit = |n: u32| bits >> n & 1 == 1;
            let (area, position) = match room {
                "no area" => (None, 0),
                "too short" => (Some(0), 0),
                "full" => (Some(8192), 8192),
                _ => (Some(1 << 20), 8192),
            };
            let journal = JournalStatus {
                standing: if bit(0) {
                    Standing::Sound
                } else {
                    Standing::Unknown
                },
                area,
                position,
                has_records: position > 0,
                has_unsynced: bit(1) && position > 0,
                carries: bit(2),
                longest: if room == "longer than any" {
                    0
                } else {
                    1 << 20
                },
                background: bit(3),
            };
            let work = Work { changes, written };
            let covered = bit(4);
            Case {
                ask,
                work,
                journal,
                room,
                covered,
            }
        }

        fn all() -> Vec<Case> {
            let mut all = Vec::new();
            for ask in [Ask::Flush, Ask::Barrier, Ask::Ahead] {
                for written in [
                    Written::Nothing,
                    Written::Few(Blocks::new(3)),
                    Written::Many,
                ] {
                    for changes in [0, 2] {
                        for room in ["longer than any", "fits", "no area", "too short", "full"] {
                            all.extend(
                                (0..32).map(|bits| Case::of(ask, written, changes, room, bits)),
                            );
                        }
                    }
                }
            }
            all
        }

        fn standing(&self) -> &'static str {
            match self.journal.standing {
                Standing::Sound => "sound",
                Standing::Unknown => "unknown",
            }
        }

        /// What the plan is to be, as the two tables have it.
        fn documented(&self, contents: &[Vec<String>], places: &[Vec<String>]) -> [String; 5] {
            let asked = match self.ask {
                Ask::Flush => "flush",
                Ask::Barrier => "barrier",
                Ask::Ahead => "ahead",
            };
            let written = match self.work.written {
                Written::Nothing => "none",
                Written::Few(_) => "few",
                Written::Many => "many",
            };
            let content = look_up(
                contents,
                &[
                    asked,
                    written,
                    yes(self.work.changes > 0),
                    yes(self.journal.carries),
                    self.standing(),
                    yes(self.covered),
                ],
            );
            if content[1] == "–" {
                return ["no", "none", "none", "none", "no"].map(String::from);
            }
            let record = match (&*content[1], self.ask) {
                ("none", _) => "none",
                (_, Ask::Ahead) => "ahead",
                _ => "of a flush",
            };
            let place = look_up(
                places,
                &[
                    record,
                    self.standing(),
                    self.room,
                    yes(self.journal.background),
                    yes(self.journal.has_unsynced),
                ],
            );
            let says = match &*place[0] {
                "none" | "checkpoint" => "none".into(),
                _ => content[1].clone(),
            };
            [
                content[0].clone(),
                says,
                place[0].clone(),
                place[1].clone(),
                place[2].clone(),
            ]
        }

        /// What the plan is.
        fn planned(&self) -> [String; 5] {
            let plan = plan(self.ask, self.work, &self.journal, self.covered);
            let (says, place, durable) = match plan.commit {
                Commit::Nothing => ("none", "none", "none"),
                Commit::Checkpoint => ("none", "checkpoint", "none"),
                Commit::Record {
                    content,
                    place,
                    when,
                } => (
                    match content {
                        Content::Blocks => "carries",
                        Content::Barrier => "barrier",
                    },
                    match place {
                        Place::Here => "here",
                        Place::NewArea => "a new area",
                        Place::OtherArea => "the other area",
                    },
                    match when {
                        When::Durable => "durable",
                        When::Ahead => "unsynced",
                    },
                ),
            };
            let synced = match plan.commit {
                Commit::Record {
                    place: Place::OtherArea,
                    ..
                } => "before",
                _ if plan.sync_journal => "after",
                _ => "no",
            };
            [yes(plan.sync_data), says, place, durable, synced].map(String::from)
        }
    }

    #[test]
    fn a_plan_is_what_the_tables_of_durability_md_say() {
        let (contents, places) = (table("| asked"), table("| record"));
        let cases = Case::all();
        assert_eq!(cases.len(), 3 * 3 * 2 * 5 * 32);
        for case in cases {
            assert_eq!(
                case.planned(),
                case.documented(&contents, &places),
                "{:?} {:?} {:?} covered: {}",
                case.ask,
                case.work,
                case.journal,
                case.covered
            );
        }
    }

    /// Each row of the tables is the first that fits for some case: none is dead.
    #[test]
    fn no_row_of_the_tables_is_dead() {
        for head in ["| asked", "| record"] {
            let whole = table(head);
            for left_out in 0..whole.len() {
                let mut rest = whole.clone();
                rest.remove(left_out);
                let (contents, places) = match head {
                    "| asked" => (rest, table("| record")),
                    _ => (table("| asked"), rest),
                };
                let differs = |case: &Case| {
                    let documented =
                        std::panic::AssertUnwindSafe(|| case.documented(&contents, &places));
                    std::panic::catch_unwind(documented).ok() != Some(case.planned())
                };
                assert!(Case::all().iter().any(differs), "{head}: row {left_out}");
            }
        }
    }

    #[test]
    fn a_record_ahead_needs_neither_a_sync_nor_room_to_be_made() {
        for case in Case::all().iter().filter(|case| case.ask == Ask::Ahead) {
            let plan = plan(case.ask, case.work, &case.journal, case.covered);
            assert!(!plan.sync_data && !plan.sync_journal);
            assert!(matches!(
                plan.commit,
                Commit::Nothing
                    | Commit::Record {
                        place: Place::Here,
                        when: When::Ahead,
                        ..
                    }
            ));
        }
    }
}
