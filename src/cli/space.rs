//! `vellum space`

use serde::Serialize;

use super::Context;
use super::output::{complain, human_size};
use vellum_base::error::Result;
use vellum_base::size::parse_size;
use vellum_engine::lazy::{CacheUse, cache_use, set_cache_limit};
use vellum_engine::space::{set_policy, space};
use vellum_store::{CacheLimit, SpacePolicy, Store, StoreSpace, Threshold};

/// Arguments of `space`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Below how much available space commands that make something warn: 10%, 20G or off
    #[arg(long, value_name = "FREE")]
    warn: Option<Threshold>,
    /// Below how much new containers, forks and images are refused
    #[arg(long, value_name = "FREE")]
    refuse: Option<Threshold>,
    /// Below how much containers' writes get ENOSPC, so that the disk does not become full
    #[arg(long, value_name = "FREE")]
    stop: Option<Threshold>,
    /// How much blocks of lazy layers may take that can be fetched again: 8M or more, or off
    #[arg(long, value_name = "SIZE", value_parser = cache_limit)]
    cache: Option<CacheLimit>,
}

fn cache_limit(text: &str) -> std::result::Result<CacheLimit, String> {
    match text.trim() {
        "off" => Ok(CacheLimit::default()),
        text => parse_size(text).map(|bytes| CacheLimit { bytes: Some(bytes) }),
    }
}

/// The disk under the store, and what is fetched.
#[derive(Serialize)]
struct Shown {
    #[serde(flatten)]
    space: StoreSpace,
    cache: CacheUse,
}

impl Shown {
    fn of(store: &Store) -> Result<Shown> {
        Ok(Shown {
            space: space(store)?,
            cache: cache_use(store)?,
        })
    }
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    let new_policy = args.warn.is_some() || args.refuse.is_some() || args.stop.is_some();
    if !new_policy && args.cache.is_none() {
        return context.out.print(&Shown::of(&context.store()?)?, shown);
    }
    let store = context.store_to_fill()?;
    if let Some(limit) = args.cache {
        set_cache_limit(&store, limit)?;
    }
    let mut failed = Vec::new();
    if new_policy {
        failed = set_policy(&store, wanted(args, &store)?)?.failed;
    }
    context.out.print(&Shown::of(&store)?, shown)?;
    for error in &failed {
        complain(error);
    }
    Ok(())
}

/// The policy that is to be. The old one counts where something of it stays, so that a damaged one can be set anew.
fn wanted(args: &Args, store: &Store) -> Result<SpacePolicy> {
    if let (Some(warn), Some(refuse), Some(stop)) = (args.warn, args.refuse, args.stop) {
        return Ok(SpacePolicy { warn, refuse, stop });
    }
    let old = store.space_policy()?;
    Ok(SpacePolicy {
        warn: args.warn.unwrap_or(old.warn),
        refuse: args.refuse.unwrap_or(old.refuse),
        stop: args.stop.unwrap_or(old.stop),
    })
}

fn shown(Shown { space, cache }: &Shown) -> String {
    let mut out = format!(
        "available  {} of {}\n",
        human_size(space.available),
        human_size(space.size)
    );
    let policy = &space.policy;
    let stages = [
        ("warn", policy.warn, space.warn_bytes),
        ("refuse", policy.refuse, space.refuse_bytes),
        ("stop", policy.stop, space.stop_bytes),
    ];
    for (name, at, bytes) in stages {
        let at = match at {
            Threshold::Off => "off".to_owned(),
            at => format!("below {at} ({})", human_size(bytes)),
        };
        out.push_str(&format!("{name:9}  {at}\n"));
    }
    out.push_str(&format!("state      {}\n", space.state));
    if cache.layers > 0 || cache.limit.bytes.is_some() {
        let taken = human_size(cache.bytes);
        let most = match cache.limit.bytes {
            Some(bytes) => format!(", at most {}", human_size(bytes)),
            None => String::new(),
        };
        out.push_str(&format!("cache      {taken} of lazy layers{most}\n"));
    }
    out
}
