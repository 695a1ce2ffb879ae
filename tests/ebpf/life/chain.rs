//! Where programs hang, both ways that there are: TCX, and clsact before Linux 6.6. A kernel that has
//! TCX is tried with both.

use std::process::Command;

use aya::programs::{SchedClassifier, TcAttachType};
use mesh_agent::dataplane::{Dataplane, Options, probe};
use mesh_core::dataplane::vigil::{Lapse, Standing};

use crate::kernel::{options, own_network};
use crate::scratch::Bpffs;

/// In a network of its own each.
pub(super) fn each_chain(check: impl Fn(&Options)) {
    for clsact in [true, false] {
        if !clsact && !probe::has_tcx() {
            continue;
        }
        own_network();
        let bpffs = Bpffs::mount().unwrap();
        check(&Options {
            clsact,
            ..options(&bpffs)
        });
    }
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {}: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// A filter that matches everything, on an interface's ingress.
fn filter(verb: &str, interface: &str, priority: &str) {
    let mut arguments = vec!["filter", verb, "dev", interface, "ingress"];
    arguments.extend(["protocol", "all", "pref", priority, "handle", "1", "bpf"]);
    if verb == "add" {
        arguments.extend(["bytecode", "1,6 0 0 4294967295,", "flowid", "1:1"]);
    }
    run("tc", &arguments);
}

/// Our programs on the ingress of an interface, by name, in their order.
pub(super) fn on(interface: &str, options: &Options) -> Vec<String> {
    if options.clsact {
        let shown = run("tc", &["filter", "show", "dev", interface, "ingress"]);
        let mut words = shown.split_whitespace();
        // `… handle 0x1 mesh_in direct-action …`
        let ours = std::iter::from_fn(|| {
            words.find(|word| *word == "handle")?;
            words.nth(1)
        });
        return ours.map(str::to_owned).collect();
    }
    let (_, programs) = SchedClassifier::query_tcx(interface, TcAttachType::Ingress).unwrap();
    let names = programs
        .iter()
        .map(|program| program.name_as_str().unwrap().to_owned());
    names.collect()
}

#[test]
fn a_successor_takes_the_place_of_the_dead_and_leaves_one_program() {
    each_chain(|options| {
        for _ in 0..3 {
            let mut dataplane = Dataplane::attach("lo", options).unwrap();
            assert_eq!(dataplane.standing().unwrap(), Standing::First);
            assert_eq!(on("lo", options), ["mesh_in"]);
        }
        let dataplane = Dataplane::attach("lo", options).unwrap();
        dataplane.detach().unwrap();
        assert_eq!(std::fs::read_dir(&options.pin_dir).unwrap().count(), 0);
    });
}

#[test]
fn programs_that_were_taken_off_are_missed_and_put_back() {
    each_chain(|options| {
        let mut dataplane = Dataplane::attach("lo", options).unwrap();
        let thief = Dataplane::attach("lo", options).unwrap();
        thief.detach().unwrap();
        assert_eq!(dataplane.standing().unwrap(), Standing::Gone);
        dataplane.pin().unwrap();
        dataplane.hang().unwrap();
        assert_eq!(dataplane.standing().unwrap(), Standing::First);
    });
}

#[test]
fn what_became_of_the_programs_of_the_dead_is_found() {
    each_chain(|options| {
        let found = || Dataplane::attach("lo", options).unwrap().found();
        assert_eq!(found(), None);
        assert_eq!(found(), Some(Standing::First));
        if options.clsact {
            run("tc", &["qdisc", "del", "dev", "lo", "clsact"]);
            assert_eq!(found(), Some(Standing::Gone));
        } else {
            let bpffs = Bpffs::mount().unwrap();
            let foreign = foreign(&bpffs, options);
            assert_eq!(found(), Some(Standing::Behind));
            foreign.detach().unwrap();
        }
        assert_eq!(found(), Some(Standing::First));
    });
}

/// Another agent's programs, pinned elsewhere, for somebody else's.
fn foreign(bpffs: &Bpffs, options: &Options) -> Dataplane {
    let options = Options {
        pin_dir: bpffs.folder("foreign"),
        ..options.clone()
    };
    Dataplane::attach("lo", &options).unwrap()
}

#[test]
fn a_foreign_program_before_ours_is_seen_and_one_behind_is_no_matter() {
    each_chain(|options| {
        let standing = |dataplane: &mut Dataplane| dataplane.standing().unwrap();
        let mut dataplane;
        if options.clsact {
            dataplane = Dataplane::attach("lo", options).unwrap();
            filter("add", "lo", "2");
            assert_eq!(standing(&mut dataplane), Standing::First);
            // Of one priority, whoever comes last is first.
            filter("add", "lo", "1");
            assert_eq!(standing(&mut dataplane), Standing::Behind);
            filter("del", "lo", "1");
        } else {
            let bpffs = Bpffs::mount().unwrap();
            let behind = foreign(&bpffs, options);
            dataplane = Dataplane::attach("lo", options).unwrap();
            assert_eq!(standing(&mut dataplane), Standing::First);
            behind.detach().unwrap();
            let before = foreign(&bpffs, options);
            assert_eq!(standing(&mut dataplane), Standing::Behind);
            before.detach().unwrap();
        }
        assert_eq!(standing(&mut dataplane), Standing::First);
    });
}

#[test]
fn a_foreign_program_that_came_and_went_between_two_looks_is_noticed() {
    each_chain(|options| {
        pair();
        run("ip", &["link", "set", "one0", "up"]);
        let mut dataplane = Dataplane::attach("lo", options).unwrap();
        dataplane.guard(["one0"]).unwrap();
        let look = |dataplane: &mut Dataplane| {
            let lapses = mended(dataplane);
            (dataplane.standing().unwrap(), lapses)
        };
        let in_place = (Standing::First, Vec::new());
        assert_eq!(look(&mut dataplane), in_place);
        if options.clsact {
            for (interface, priority) in [("lo", "2"), ("one0", "3")] {
                filter("add", interface, priority);
                filter("del", interface, priority);
            }
            assert_eq!(look(&mut dataplane), in_place, "those were behind");
        }
        for _ in 0..2 {
            if options.clsact {
                for interface in ["lo", "one0"] {
                    filter("add", interface, "1");
                    filter("del", interface, "1");
                }
            } else {
                let bpffs = Bpffs::mount().unwrap();
                let mut before = foreign(&bpffs, options);
                before.guard(["one0"]).unwrap();
                before.detach().unwrap();
            }
            let visited = vec![("one0".to_owned(), Lapse::Visited)];
            assert_eq!(look(&mut dataplane), (Standing::FirstAgain, visited));
            assert_eq!(look(&mut dataplane), in_place);
        }
    });
}

/// Nothing holds them there but themselves. A clsact filter is replaced without being known; what hangs
/// in TCX must be known, because it cannot.
#[test]
fn programs_without_pins_go_on_and_are_known_as_orphans() {
    each_chain(|options| {
        let in_its = |bpffs: &Bpffs| Options {
            pin_dir: bpffs.folder("mesh"),
            ..options.clone()
        };
        let bpffs = Bpffs::mount().unwrap();
        let first = in_its(&bpffs);
        assert!(!Dataplane::is_orphaned("lo", &first).unwrap());
        drop(Dataplane::attach("lo", &first).unwrap());
        assert!(!Dataplane::is_orphaned("lo", &first).unwrap());
        drop(bpffs);
        assert_eq!(on("lo", options), ["mesh_in"]);
        let bpffs = Bpffs::mount().unwrap();
        let second = in_its(&bpffs);
        let is_orphaned = Dataplane::is_orphaned("lo", &second).unwrap();
        assert_eq!(is_orphaned, !options.clsact);
        if options.clsact {
            let mut dataplane = Dataplane::attach("lo", &second).unwrap();
            assert_eq!(dataplane.standing().unwrap(), Standing::First);
            assert_eq!(on("lo", options), ["mesh_in"]);
        }
    });
}

/// Others may hang between a guard and one that no pin leads to.
#[test]
fn guards_without_pins_are_known_by_their_numbers() {
    each_chain(|options| {
        pair();
        let folder = tempfile::tempdir().unwrap();
        let in_its = |bpffs: &Bpffs| Options {
            pin_dir: bpffs.folder("mesh"),
            numbers: Some(folder.path().join("guards")),
            ..options.clone()
        };
        let start = |bpffs: &Bpffs| {
            let mut dataplane = Dataplane::attach("two0", &in_its(bpffs)).unwrap();
            dataplane.guard(["one0"]).unwrap();
            dataplane
        };
        let mut bpffs = Bpffs::mount().unwrap();
        drop(start(&bpffs));
        for _ in 0..3 {
            drop(bpffs);
            bpffs = Bpffs::mount().unwrap();
            let mut dataplane = start(&bpffs);
            assert_eq!(on("one0", options), ["guard"]);
            assert_eq!(mended(&mut dataplane), []);
        }
        // Nobody's that is not noted is touched.
        let elsewhere = Bpffs::mount().unwrap();
        let mut stranger = foreign(&elsewhere, options);
        if !options.clsact {
            stranger.guard(["one0"]).unwrap();
            drop(start(&bpffs));
            assert_eq!(on("one0", options), ["guard", "guard"]);
        }
    });
}

fn mended(dataplane: &mut Dataplane) -> Vec<(String, Lapse)> {
    let (lapses, result) = dataplane.mend_guards();
    result.unwrap();
    lapses
}

fn pair() {
    let between = ["type", "veth", "peer", "two0"];
    run("ip", &[&["link", "add", "one0"], &between[..]].concat());
}

#[test]
fn guards_follow_the_set_that_they_are_told() {
    each_chain(|options| {
        pair();
        let start = || Dataplane::attach("lo", options).unwrap();
        let seen = || (on("lo", options).len(), on("one0", options).len());
        let mut dataplane = start();
        dataplane.guard(["one0"]).unwrap();
        assert_eq!(on("one0", options), ["guard"]);
        dataplane.guard(["one0", "gone0"]).unwrap();
        assert_eq!(seen(), (1, 1));
        drop(dataplane);
        dataplane = start();
        assert_eq!(seen(), (1, 1), "it guards while no agent runs");
        dataplane.guard(["one0"]).unwrap();
        assert_eq!(seen(), (1, 1));
        drop(dataplane);
        dataplane = start();
        dataplane.guard([]).unwrap();
        assert_eq!(seen(), (1, 0), "a predecessor's guard is taken away too");
    });
}

#[test]
fn a_guard_stays_with_an_interface_that_gets_another_name() {
    each_chain(|options| {
        pair();
        let mut dataplane = Dataplane::attach("lo", options).unwrap();
        dataplane.guard(["one0", "two0"]).unwrap();
        run("ip", &["link", "set", "one0", "name", "new0"]);
        dataplane.guard(["new0", "two0"]).unwrap();
        assert_eq!(mended(&mut dataplane), []);
        // Under its new name it is looked after as under its old one.
        if options.clsact {
            run("ip", &["link", "set", "new0", "up"]);
            filter("add", "new0", "1");
            let behind = ("new0".to_owned(), Lapse::Behind);
            assert_eq!(mended(&mut dataplane), [behind]);
            filter("del", "new0", "1");
        }
        assert_eq!(mended(&mut dataplane), []);
        dataplane.guard([]).unwrap();
        dataplane.detach().unwrap();
    });
}

#[test]
fn guards_of_many_interfaces_are_hung_a_few_at_a_time() {
    each_chain(|options| {
        pair();
        run("ip", &["link", "set", "lo", "name", "low0"]);
        let mut dataplane = Dataplane::attach("low0", options).unwrap();
        dataplane.want_guards(["low0", "one0", "two0"]).unwrap();
        let missing = |name: &str| (name.to_owned(), Lapse::Missing);
        assert_eq!(mended(&mut dataplane), ["one0", "two0"].map(missing));
        while dataplane.hang_guards().unwrap() {}
        assert_eq!(mended(&mut dataplane), []);
        let guarded = ["low0", "one0", "two0"].map(|name| on(name, options).len());
        assert_eq!(guarded, [1, 1, 1], "loopback has the filter and no guard");
    });
}
