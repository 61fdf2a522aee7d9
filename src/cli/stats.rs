//! `vellum stats [NAME…]`

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use super::Context;
use super::output::{human_size, table, write_out};
use vellum_base::error::{Error, ErrorKind, Result};
use vellum_engine::stats::{Counters, Latency, Server, Stats, served, stats};
use vellum_store::Store;

/// Arguments of `stats`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Containers [default: all that are mounted or served]
    #[arg(add = super::completions::containers())]
    names: Vec<String>,
    /// Print them again and again until interrupted; with --json one line each time
    #[arg(short, long)]
    watch: bool,
    /// Seconds between two times
    #[arg(
        short,
        long,
        value_name = "SECONDS",
        default_value_t = 1.0,
        requires = "watch"
    )]
    interval: f64,
    /// End after so many times
    #[arg(short = 'n', long, value_name = "N", requires = "watch")]
    count: Option<u64>,
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    let store = context.store()?;
    if !args.watch {
        let all = collect(&store, &args.names)?;
        return context.out.print(&all, |all| whole(all, &[]));
    }
    let pause = Duration::try_from_secs_f64(args.interval.max(0.01)).map_err(|error| {
        Error::with_source(
            ErrorKind::InvalidInput,
            "--interval: no time to wait",
            error,
        )
    })?;
    let mut before: Vec<Stats> = Vec::new();
    let mut since = Instant::now();
    let mut times = 0;
    loop {
        let now = collect(&store, &args.names)?;
        // Asking takes its time too.
        let seconds = since.elapsed().max(pause).as_secs_f64();
        since = Instant::now();
        if context.out.json {
            context.out.print_line(&now)?;
        } else {
            let clear = if std::io::stdout().is_terminal() {
                // Home, then clear to the end.
                "\x1b[H\x1b[J"
            } else {
                ""
            };
            let rates = rates(&before, &now, seconds);
            let text = format!("{clear}{}\n", whole(&now, &rates));
            write_out(text.as_bytes())?;
        }
        times += 1;
        if args.count.is_some_and(|count| times >= count) {
            return Ok(());
        }
        before = now;
        std::thread::sleep(pause);
    }
}

fn collect(store: &Store, names: &[String]) -> Result<Vec<Stats>> {
    if names.is_empty() {
        return served(store);
    }
    names.iter().map(|name| stats(store, name)).collect()
}

/// What happened since the time before, a second.
fn rates(before: &[Stats], now: &[Stats], seconds: f64) -> Vec<String> {
    let rate = |now: &Stats| -> Option<String> {
        let before = before.iter().find(|before| before.id == now.id)?;
        let (old, new) = (before.counters.as_ref()?, now.counters.as_ref()?);
        let per = |new: u64, old: u64| new.saturating_sub(old) as f64 / seconds;
        Some(format!(
            "a second: {:.0} reads, {:.0} writes ({:.0} first touches), {:.0} flushes, {} written",
            per(new.reads.requests, old.reads.requests),
            per(new.writes.requests, old.writes.requests),
            per(new.writes.first_touch.count, old.writes.first_touch.count),
            per(new.flushes.latency.count, old.flushes.latency.count),
            human_size(per(new.writes.bytes, old.writes.bytes) as u64),
        ))
    };
    now.iter()
        .map(|now| rate(now).unwrap_or_default())
        .collect()
}

fn whole(all: &[Stats], rates: &[String]) -> String {
    if all.is_empty() {
        return "no container is mounted or served\n".into();
    }
    let texts = all.iter().enumerate();
    let texts = texts.map(|(at, stats)| one(stats, rates.get(at).map_or("", String::as_str)));
    texts.collect::<Vec<_>>().join("\n")
}

fn one(stats: &Stats, rate: &str) -> String {
    let how = match (stats.server, &stats.mounted) {
        (None, _) => "nobody serves it: its layers alone are known".into(),
        (Some(Server::Nbd), _) => "served over NBD".into(),
        (Some(Server::Vhost), _) => "served over vhost-user".into(),
        (Some(Server::Device), Some(dir)) => format!("mounted at {}", super::shown(dir)),
        (Some(Server::Device), None) => "attached".into(),
    };
    let name = stats.name.replace(char::is_control, "?");
    let mut out = format!("{name}: {how}");
    if let Some(counters) = &stats.counters {
        out.push_str(&format!(", counted since {}\n", counters.since));
        if !rate.is_empty() {
            out.push_str(&format!("{rate}\n"));
        }
        out.push_str(&requests(counters));
        out.push_str(&costs(counters));
        let reserved = human_size(counters.space.reserved_bytes);
        out.push_str(&format!("\nspace: {reserved} reserved on the store's disk"));
        if let Some(since) = &counters.space.full_since {
            out.push_str(&format!(", which has been full since {since}"));
        }
        out.push('\n');
    } else {
        out.push('\n');
    }
    if let Some(asked) = &stats.fetcher {
        out.push_str(&format!(
            "\nregistries: {} parts of blobs were asked for, {} of them twice since nothing moved ({} came by the second \
             request)\n",
            asked.requests, asked.hedges, asked.hedges_won
        ));
    }
    out.push_str(&layers(stats));
    out
}

fn requests(counters: &Counters) -> String {
    let none = ["", "", "", "", "", ""].map(str::to_owned);
    let reads = &counters.reads;
    let mut rows = vec![row(
        "read",
        reads.requests,
        human_size(reads.bytes),
        none.clone(),
    )];
    let writes = &counters.writes;
    rows.push(row(
        "write",
        writes.requests,
        human_size(writes.bytes),
        none,
    ));
    for (name, latency) in [
        ("  first touch", &writes.first_touch),
        ("  steady", &writes.steady),
    ] {
        rows.push(row(name, latency.count, String::new(), times(latency)));
    }
    let flush = &counters.flushes.latency;
    rows.push(row("flush", flush.count, String::new(), times(flush)));
    table(
        &[
            "REQUEST", "COUNT", "BYTES", "TIMED", "MEDIAN", "90 %", "99 %", "99.9 %", "LONGEST",
        ],
        &rows,
    )
}

fn row(name: &str, count: u64, bytes: String, times: [String; 6]) -> Vec<String> {
    let mut row = vec![name.to_owned(), count.to_string(), bytes];
    row.extend(times);
    row
}

/// How many were timed, and their percentiles.
fn times(latency: &Latency) -> [String; 6] {
    let [p50, p90, p99, p999, max] = [
        latency.p50_us,
        latency.p90_us,
        latency.p99_us,
        latency.p999_us,
        latency.max_us,
    ]
    .map(|micros| {
        if latency.timed == 0 {
            "-".into()
        } else {
            human_time(micros)
        }
    });
    [latency.timed.to_string(), p50, p90, p99, p999, max]
}

/// Microseconds for people.
fn human_time(micros: f64) -> String {
    if micros < 9.95 {
        format!("{micros:.1} µs")
    } else if micros < 995.0 {
        format!("{micros:.0} µs")
    } else if micros < 9_950.0 {
        format!("{:.1} ms", micros / 1e3)
    } else if micros < 995_000.0 {
        format!("{:.0} ms", micros / 1e3)
    } else {
        format!("{:.1} s", micros / 1e6)
    }
}

fn costs(counters: &Counters) -> String {
    let copy_up = &counters.copy_up;
    let disk = &counters.amplification;
    let flushes = &counters.flushes;
    let mut lines = vec![
        format!(
            "copy-up      {} blocks allocated by writes, {} of them filled up from below: {} copied, {:.4} for each byte written",
            copy_up.first_touch_blocks,
            copy_up.partial,
            human_size(copy_up.copied_bytes),
            copy_up.copied_per_written,
        ),
        format!(
            "written      {} by clients; {} to data, {} to journals, {} to maps: {:.2} × in all",
            human_size(disk.written_bytes),
            human_size(disk.stored_bytes),
            human_size(disk.journal_bytes),
            human_size(disk.checkpoint_bytes),
            disk.factor,
        ),
        format!(
            "flushes      {} ({} had nothing to do, {} were covered by another): {:.2} synchronous operations each ({} data syncs, {} journal syncs; {} journal writes, {} of them ahead of a flush)",
            flushes.count,
            flushes.empty,
            flushes.coalesced,
            flushes.syncs_per_flush,
            flushes.data_syncs,
            flushes.journal_syncs,
            flushes.journal_writes,
            flushes.records_ahead,
        ),
        format!("allocated    {}", growth(counters)),
    ];
    if copy_up.prewarmed_blocks > 0 {
        lines.push(format!("prewarmed    {} blocks", copy_up.prewarmed_blocks));
    }
    if counters.writes.discarded_bytes > 0 {
        let bytes = human_size(counters.writes.discarded_bytes);
        lines.push(format!("discarded    {bytes}, zeroed ones included"));
    }
    if flushes.journal_waits > 0 {
        let waits = flushes.journal_waits;
        lines.push(format!(
            "waits        {waits} flushes for room in the journal"
        ));
    }
    lines.join("\n") + "\n"
}

/// How many blocks came in the last moments.
fn growth(counters: &Counters) -> String {
    let blocks = &counters.blocks;
    let since = |seconds: u64| {
        let before = blocks.over_time.iter();
        let before = before.filter(|sample| sample.seconds_ago >= seconds);
        let before = before.map(|sample| sample.total).max().unwrap_or_default();
        blocks.allocated.saturating_sub(before)
    };
    format!(
        "{} blocks are held; {} came in the last 10 s, {} in the last minute, {} in the last hour, {} in all",
        blocks.held,
        since(10),
        since(60),
        since(3600),
        blocks.allocated,
    )
}

fn layers(stats: &Stats) -> String {
    let reads: u64 = stats
        .layers
        .iter()
        .filter_map(|layer| layer.read_blocks)
        .sum();
    let zero = stats
        .counters
        .as_ref()
        .map_or(0, |all| all.reads.zero_blocks);
    let number = |value: Option<u64>| value.map_or("?".into(), |value| value.to_string());
    let share = |blocks: Option<u64>| match blocks {
        Some(blocks) if reads + zero > 0 => {
            format!(
                "{blocks} ({:.1} %)",
                blocks as f64 * 100.0 / (reads + zero) as f64
            )
        }
        Some(blocks) => blocks.to_string(),
        None => "-".into(),
    };
    let mut rows: Vec<Vec<String>> = stats
        .layers
        .iter()
        .rev()
        .map(|layer| {
            vec![
                layer.number.to_string(),
                layer.uuid.to_string().chars().take(12).collect(),
                number(layer.blocks),
                share(layer.read_blocks),
                layer.origin.replace(char::is_control, "?"),
            ]
        })
        .collect();
    if stats.counters.is_some() {
        let none = String::new();
        let note = "zeros that no layer holds".to_owned();
        rows.push(vec![
            "-".into(),
            none.clone(),
            none,
            share(Some(zero)),
            note,
        ]);
    }
    table(&["LAYER", "ID", "BLOCKS", "BLOCKS READ", "ORIGIN"], &rows)
}
