//! The helper's side, on a folder instead of /etc.
//!
//! What cannot be had without root and mounts, a file that nothing can be renamed onto, is in the
//! netns ring.

use std::os::unix::fs::{MetadataExt as _, symlink};
use std::time::{Duration, SystemTime};

use super::super::protocol::Request;
use super::*;

/// Comments, odd spacing and no newline at the end: all of it has to come back.
const BEFORE: &str = "# by hand\n\nnameserver   192.0.2.53\nsearch corp.example\noptions edns0";

struct Lab {
    folder: tempfile::TempDir,
    host: Host,
}

impl Lab {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let host = Host::new(
            &folder.path().join("resolv.conf"),
            &folder.path().join("state"),
        );
        Self { folder, host }
    }

    /// With a file that somebody has taken care of.
    fn with_file() -> Self {
        let lab = Self::new();
        fs::write(lab.path(), BEFORE).unwrap();
        fs::set_permissions(lab.path(), fs::Permissions::from_mode(0o640)).unwrap();
        let day = SystemTime::UNIX_EPOCH + Duration::from_secs(86400);
        File::options()
            .write(true)
            .open(lab.path())
            .unwrap()
            .set_modified(day)
            .unwrap();
        lab
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("resolv.conf")
    }

    fn text(&self) -> String {
        fs::read_to_string(self.path()).unwrap()
    }

    /// Everything that a restored file must have back.
    fn print(&self) -> (String, u32, u32, u32, i64, u64) {
        let meta = self.path().symlink_metadata().unwrap();
        let (mode, uid, gid) = (meta.mode(), meta.uid(), meta.gid());
        (self.text(), mode, uid, gid, meta.mtime(), meta.ino())
    }

    /// Nothing of ours is left in the folder.
    fn assert_tidy(&self) {
        let mut names: Vec<String> = fs::read_dir(self.folder.path())
            .unwrap()
            .chain(fs::read_dir(self.folder.path().join("state")).unwrap())
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name != "resolv.conf" && name != "real")
            .collect();
        names.sort();
        assert_eq!(names, ["lock", "state"]);
    }
}

fn setting(server: &str) -> Setting {
    let line = format!("set mesh0 mesh.internal {server} mesh.internal,100.in-addr.arpa");
    match Request::parse(line.as_bytes()) {
        Ok(Request::Set(setting)) => setting,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_file_is_replaced_and_comes_back_whole() {
    let lab = Lab::with_file();
    let before = lab.print();

    let report = lab.host.set(&setting("100.64.0.1")).unwrap();
    assert_eq!(report.mode, Mode::Replaced);
    assert_eq!(report.upstreams, ["192.0.2.53"]);
    assert!(
        lab.text()
            .contains("nameserver 100.64.0.1\nsearch mesh.internal corp.example\n")
    );
    assert_eq!(lab.path().metadata().unwrap().mode() & 0o777, 0o644);
    assert_eq!(lab.host.status().unwrap(), report);

    let report = lab.host.restore().unwrap();
    assert_eq!(
        (report.mode, report.upstreams),
        (Mode::None, vec!["192.0.2.53".to_owned()])
    );
    assert_eq!(lab.print(), before);
    lab.assert_tidy();
}

#[test]
fn being_told_twice_changes_nothing_and_being_told_anew_changes_the_file() {
    let lab = Lab::with_file();
    let before = lab.print();
    lab.host.set(&setting("100.64.0.1")).unwrap();
    let inode = lab.print().5;
    lab.host.set(&setting("100.64.0.1")).unwrap();
    assert_eq!(lab.print().5, inode);
    let report = lab.host.set(&setting("100.64.0.9")).unwrap();
    assert_eq!(report.upstreams, ["192.0.2.53"]);
    assert!(lab.text().contains("100.64.0.9") && !lab.text().contains("100.64.0.1\n"));
    lab.host.restore().unwrap();
    lab.host.restore().unwrap();
    assert_eq!(lab.print(), before);
    lab.assert_tidy();
}

#[test]
fn a_symlink_comes_back_as_a_symlink() {
    for target in ["real", "nowhere"] {
        let lab = Lab::new();
        fs::write(lab.folder.path().join("real"), BEFORE).unwrap();
        symlink(target, lab.path()).unwrap();
        let report = lab.host.set(&setting("100.64.0.1")).unwrap();
        assert_eq!(report.mode, Mode::Replaced);
        assert!(lab.path().symlink_metadata().unwrap().is_file());
        lab.host.restore().unwrap();
        assert_eq!(fs::read_link(lab.path()).unwrap(), Path::new(target));
        assert_eq!(
            fs::read_to_string(lab.folder.path().join("real")).unwrap(),
            BEFORE
        );
        lab.assert_tidy();
    }
}

#[test]
fn where_there_was_no_file_there_is_none_again() {
    let lab = Lab::new();
    let report = lab.host.set(&setting("100.64.0.1")).unwrap();
    assert_eq!((report.mode, report.upstreams), (Mode::Replaced, vec![]));
    lab.host.restore().unwrap();
    assert!(!lab.path().exists());
    lab.assert_tidy();
}

#[test]
fn a_file_that_somebody_wrote_since_is_theirs() {
    let lab = Lab::with_file();
    lab.host.set(&setting("100.64.0.1")).unwrap();
    fs::remove_file(lab.path()).unwrap();
    fs::write(lab.path(), "nameserver 198.51.100.7\n").unwrap();

    // Told again, we take the new file for the one to come back to.
    let report = lab.host.set(&setting("100.64.0.1")).unwrap();
    assert_eq!(report.upstreams, ["198.51.100.7"]);
    lab.host.restore().unwrap();
    assert_eq!(lab.text(), "nameserver 198.51.100.7\n");
    lab.assert_tidy();

    lab.host.set(&setting("100.64.0.1")).unwrap();
    fs::write(lab.path(), "nameserver 203.0.113.7\n").unwrap();
    assert_eq!(lab.host.status().unwrap().mode, Mode::None);
    lab.host.restore().unwrap();
    assert_eq!(lab.text(), "nameserver 203.0.113.7\n");
    lab.assert_tidy();
}

/// Each is a state that the disk is in when we die inside `set` or `restore`.
#[test]
fn a_crash_at_any_step_is_undone_by_the_next_start() {
    type Crash = fn(&Host);
    let crashes: [Crash; 6] = [
        |host| write_durably(&host.previous(), BEFORE.as_bytes()).unwrap(),
        |host| host.put_record(&Record::Replaced).unwrap(),
        |host| {
            host.put_record(&Record::Replaced).unwrap();
            fs::hard_link(&host.resolv_conf, host.beside("linking")).unwrap();
        },
        |host| {
            host.put_record(&Record::Replaced).unwrap();
            host.keep().unwrap();
            fs::write(host.beside("new"), "half").unwrap();
        },
        |host| {
            host.set(&setting("100.64.0.1")).unwrap();
        },
        |host| {
            host.set(&setting("100.64.0.1")).unwrap();
            fs::rename(host.kept(), &host.resolv_conf).unwrap();
        },
    ];
    for (number, crash) in crashes.into_iter().enumerate() {
        for again in [false, true] {
            let lab = Lab::with_file();
            let before = lab.print();
            lab.host.lock().unwrap();
            crash(&lab.host);
            if again {
                lab.host.set(&setting("100.64.0.1")).unwrap();
            }
            lab.host.restore().unwrap();
            assert_eq!(lab.print(), before, "crash {number}, set again: {again}");
            if number > 0 || again {
                lab.assert_tidy();
            }
        }
    }
}

#[test]
fn a_file_written_in_place_is_recognised_however_it_is_torn() {
    let ours = ResolvConf::parse(BEFORE).render(&setting("100.64.0.1"));
    for torn in [&ours[..], &ours[..20], "", &BEFORE[..15], BEFORE] {
        let lab = Lab::with_file();
        let before = lab.print();
        lab.host.lock().unwrap();
        write_durably(&lab.host.previous(), BEFORE.as_bytes()).unwrap();
        lab.host.put_record(&Record::InPlace).unwrap();
        fs::write(lab.path(), torn).unwrap();
        lab.host.restore().unwrap();
        let after = lab.print();
        assert_eq!(
            (&after.0, after.1, after.5),
            (&before.0, before.1, before.5),
            "{torn:?}"
        );
        lab.assert_tidy();
    }
}

#[test]
fn a_lost_state_folder_does_not_lose_the_file() {
    let lab = Lab::with_file();
    let before = lab.print();
    lab.host.set(&setting("100.64.0.1")).unwrap();
    fs::remove_dir_all(lab.folder.path().join("state")).unwrap();
    lab.host.set(&setting("100.64.0.2")).unwrap();
    fs::remove_dir_all(lab.folder.path().join("state")).unwrap();
    lab.host.restore().unwrap();
    assert_eq!(lab.print(), before);
    lab.assert_tidy();
}

#[test]
fn a_damaged_record_is_named() {
    let lab = Lab::with_file();
    lab.host.set(&setting("100.64.0.1")).unwrap();
    fs::write(lab.host.record_path(), "replac").unwrap();
    let error = lab.host.restore().unwrap_err().to_string();
    assert!(error.contains("record is damaged"), "{error}");
}

#[test]
fn resolved_is_told_about_our_interface_only() {
    let calls: Vec<String> = resolvectl_calls(&setting("100.64.0.1,fd01::1"))
        .iter()
        .map(|words| words.join(" "))
        .collect();
    assert_eq!(
        calls,
        [
            "dns mesh0 100.64.0.1 fd01::1",
            "domain mesh0 mesh.internal ~100.in-addr.arpa",
            "default-route mesh0 false",
            "dnssec mesh0 no",
            "dnsovertls mesh0 no",
            "llmnr mesh0 no",
            "mdns mesh0 no",
        ]
    );
}

#[test]
fn programs_that_fail_are_quoted() {
    let error = run(Path::new("/bin/sh"), &["-c", "echo broken >&2; exit 3"], "").unwrap_err();
    let error = format!("{error:#}");
    assert!(
        error.contains("exit status: 3") && error.contains("broken"),
        "{error}"
    );
}
