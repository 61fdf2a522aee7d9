//! `vellum space`

use super::Context;
use super::output::{complain, human_size};
use vellum_base::error::Result;
use vellum_engine::space::{set_policy, space};
use vellum_store::{SpacePolicy, Store, StoreSpace, Threshold};

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
}

pub(super) fn run(args: &Args, context: &Context) -> Result<()> {
    if args.warn.is_none() && args.refuse.is_none() && args.stop.is_none() {
        return context.out.print(&space(&context.store()?)?, shown);
    }
    let store = context.store_to_fill()?;
    let set = set_policy(&store, wanted(args, &store)?)?;
    context.out.print(&space(&store)?, shown)?;
    for error in &set.failed {
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

fn shown(space: &StoreSpace) -> String {
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
    out
}
