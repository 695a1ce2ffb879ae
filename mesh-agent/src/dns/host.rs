//! The host's resolver configuration, as root changes it and puts it back.
//!
//! Put back means: the same file, with its bytes, mode, owner, times and links, whatever killed us
//! in between. So the host's file is not copied but kept: it gets a second name beside it (a hard
//! link, to the symlink itself where it is one), ours is renamed over the first, and to restore is
//! to rename the second name back. Where nothing can be renamed onto the file, as onto a bind
//! mount in a container, the file stays and only its bytes change and return.
//!
//! A record on disk says what was done before it is done. A file that is no longer ours when we
//! come to restore belongs to whoever wrote it since, and stays.

mod files;
mod manager;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};

use super::protocol::{Mode, Report, Setting};
use super::resolv_conf::{MARKER, ResolvConf};
use super::system::interface_index;
use files::{exists, read, remove, write_durably};
use manager::{
    Manager, RESOLVECTL, resolvconf_program, resolvectl_calls, run, set_by_resolvconf,
    source_prefix, upstreams,
};

/// The host's resolver. Every method may be called at any time and any number of times.
#[derive(Clone, Debug)]
pub struct Host {
    resolv_conf: PathBuf,
    state: PathBuf,
}

/// What was done, and so what is to be undone.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Record {
    Resolved {
        interface: String,
    },
    Resolvconf {
        source: String,
    },
    /// The host's file waits under its second name.
    Replaced,
    /// There was no file.
    Created,
    /// The host's bytes wait in the state folder.
    InPlace,
}

impl Host {
    /// `state` is a folder of root's own that outlives a reboot, as `/etc` does.
    pub fn new(resolv_conf: &Path, state: &Path) -> Self {
        Self {
            resolv_conf: resolv_conf.to_owned(),
            state: state.to_owned(),
        }
    }

    /// Makes the host ask `setting.servers`.
    pub fn set(&self, setting: &Setting) -> anyhow::Result<Report> {
        let _lock = self.lock()?;
        match (self.record()?, Manager::of(&self.resolv_conf)?) {
            (Some(Record::Resolved { interface }), Manager::Resolved)
                if interface == setting.interface.as_str() =>
            {
                self.set_resolved(setting)?;
            }
            (Some(Record::Resolvconf { source }), Manager::Resolvconf(program))
                if source.ends_with(setting.interface.as_str()) =>
            {
                set_by_resolvconf(&program, &source, setting)?;
            }
            (Some(Record::Replaced | Record::Created), _) if self.is_ours()? => {
                self.replace(&self.render(setting)?)?;
            }
            (Some(Record::InPlace), _) if self.is_ours()? => {
                self.overwrite(&self.render(setting)?)?;
            }
            (Some(record), _) => {
                // Somebody else has taken over the file, or the host has changed its ways.
                self.undo(&record)?;
                self.set_afresh(setting)?;
            }
            (None, _) => self.set_afresh(setting)?,
        }
        self.report()
    }

    /// Puts back what was there before.
    pub fn restore(&self) -> anyhow::Result<Report> {
        let _lock = self.lock()?;
        match self.record()? {
            Some(record) => self.undo(&record)?,
            // Our file without a record: the state folder was lost, the second name was not.
            None if self.is_ours()? && exists(&self.kept())? => self.undo(&Record::Replaced)?,
            None => {}
        }
        self.report()
    }

    pub fn status(&self) -> anyhow::Result<Report> {
        let _lock = self.lock()?;
        self.report()
    }

    fn report(&self) -> anyhow::Result<Report> {
        let mode = match self.record()? {
            None => Mode::None,
            Some(Record::Resolved { .. }) => Mode::Resolved,
            Some(Record::Resolvconf { .. }) => Mode::Resolvconf,
            Some(_) if !self.is_ours()? => Mode::None,
            Some(Record::Replaced | Record::Created) => Mode::Replaced,
            Some(Record::InPlace) => Mode::InPlace,
        };
        let before = match mode {
            Mode::None => read(&self.resolv_conf)?,
            _ => read(&self.previous())?,
        };
        Ok(Report {
            mode,
            upstreams: upstreams(&before.unwrap_or_default()),
        })
    }

    // === set ===

    fn set_afresh(&self, setting: &Setting) -> anyhow::Result<()> {
        let before = match self.is_ours()? {
            // Ours, but nobody remembers: what it hides is lost, or waits under the second name.
            true => read(&self.kept())?,
            false => read(&self.resolv_conf)?,
        };
        write_durably(&self.previous(), before.as_deref().unwrap_or_default())?;
        match Manager::of(&self.resolv_conf)? {
            Manager::Resolved => {
                let interface = setting.interface.as_str().to_owned();
                self.put_record(&Record::Resolved { interface })?;
                self.set_resolved(setting)
            }
            Manager::Resolvconf(program) => {
                let source = format!("{}{}", source_prefix(), setting.interface.as_str());
                self.put_record(&Record::Resolvconf {
                    source: source.clone(),
                })?;
                set_by_resolvconf(&program, &source, setting)
            }
            Manager::File if !exists(&self.resolv_conf)? => {
                self.put_record(&Record::Created)?;
                self.replace(&self.render(setting)?)
            }
            Manager::File => self.set_file(setting),
        }
    }

    /// Tells systemd-resolved, unless it was told just this of just this device. It remembers by
    /// the device's number, over its own restarts too, and forgets when the device goes.
    fn set_resolved(&self, setting: &Setting) -> anyhow::Result<()> {
        let name = setting.interface.as_str();
        let index = interface_index(name).with_context(|| format!("look for {name}"))?;
        let calls = resolvectl_calls(setting);
        let words: Vec<String> = calls.iter().map(|words| words.join(" ")).collect();
        let told = format!("{index}\n{}\n", words.join("\n"));
        if read(&self.told())?.as_deref() == Some(told.as_bytes()) {
            return Ok(());
        }
        for words in &calls {
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            run(Path::new(RESOLVECTL), &words, "")?;
        }
        write_durably(&self.told(), told.as_bytes())
    }

    fn set_file(&self, setting: &Setting) -> anyhow::Result<()> {
        let text = self.render(setting)?;
        self.put_record(&Record::Replaced)?;
        let renamed = self.keep().and_then(|()| self.replace(&text));
        let Err(cannot_rename) = renamed else {
            return Ok(());
        };
        // EBUSY or EXDEV, a bind mount; EPERM, an immutable folder. The record changes first:
        // from here on the second name is nothing to rename back.
        self.put_record(&Record::InPlace)?;
        remove(&self.kept())?;
        if let Err(error) = self.overwrite(&text) {
            self.undo(&Record::InPlace).ok();
            bail!(
                "resolv.conf can be neither replaced ({cannot_rename:#}) nor written ({error:#})"
            );
        }
        Ok(())
    }

    /// Gives the host's file its second name.
    fn keep(&self) -> anyhow::Result<()> {
        if self.is_ours()? {
            return Ok(());
        }
        // By way of a third name, since a link cannot replace an older second one, a rename can.
        let third = self.beside("linking");
        remove(&third)?;
        fs::hard_link(&self.resolv_conf, &third).context("keep the host's resolv.conf")?;
        fs::rename(&third, self.kept()).context("keep the host's resolv.conf")
    }

    fn replace(&self, text: &str) -> anyhow::Result<()> {
        if read(&self.resolv_conf)?.as_deref() == Some(text.as_bytes()) {
            return Ok(());
        }
        let new = self.beside("new");
        remove(&new)?;
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o644)
            .open(&new)
            .context("write a new resolv.conf")?;
        // Everybody must read it, whatever our umask.
        file.set_permissions(fs::Permissions::from_mode(0o644))?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        if let Err(error) = fs::rename(&new, &self.resolv_conf) {
            remove(&new)?;
            return Err(error).context("put a new resolv.conf in place");
        }
        Ok(())
    }

    /// Through the file itself. Emptied first: whatever a crash leaves is then a beginning of what
    /// was to be written, and can be told from another's file.
    fn overwrite(&self, text: impl AsRef<[u8]>) -> anyhow::Result<()> {
        if read(&self.resolv_conf)?.as_deref() == Some(text.as_ref()) {
            return Ok(());
        }
        let mut file = OpenOptions::new().write(true).open(&self.resolv_conf)?;
        file.set_len(0)?;
        file.write_all(text.as_ref())?;
        file.sync_all()?;
        Ok(())
    }

    fn render(&self, setting: &Setting) -> anyhow::Result<String> {
        let before = read(&self.previous())?.unwrap_or_default();
        Ok(ResolvConf::parse(&String::from_utf8_lossy(&before)).render(setting))
    }

    // === restore ===

    fn undo(&self, record: &Record) -> anyhow::Result<()> {
        match record {
            // Fails when the interface is gone, and with it all that there was to revert.
            Record::Resolved { interface } => {
                run(Path::new(RESOLVECTL), &["revert", interface], "").ok();
            }
            Record::Resolvconf { source } => {
                if let Some(program) = resolvconf_program() {
                    run(&program, &["-d", source], "")?;
                }
            }
            Record::Replaced if self.is_ours()? => self.put_back()?,
            Record::Created if self.is_ours()? => remove(&self.resolv_conf)?,
            Record::InPlace if self.is_ours()? => {
                let before = read(&self.previous())?.context("the host's resolv.conf is lost")?;
                self.overwrite(before).context("restore resolv.conf")?;
            }
            Record::Replaced | Record::Created | Record::InPlace => {}
        }
        // What is still there of the second name is a crash's, or stands for a file that somebody
        // has replaced since.
        remove(&self.kept())?;
        remove(&self.beside("new"))?;
        remove(&self.beside("linking"))?;
        remove(&self.told())?;
        remove(&self.record_path())?;
        remove(&self.previous())
    }

    fn put_back(&self) -> anyhow::Result<()> {
        match fs::rename(self.kept(), &self.resolv_conf) {
            Ok(()) => Ok(()),
            // Somebody tidied up /etc. The bytes at least are still known.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let before = read(&self.previous())?.context("the host's resolv.conf is lost")?;
                self.replace(&String::from_utf8_lossy(&before))
            }
            Err(error) => Err(error).context("restore resolv.conf"),
        }
    }

    // === what is there ===

    /// Whether what stands there now is of our making, whole or torn by a crash.
    fn is_ours(&self) -> anyhow::Result<bool> {
        let Some(current) = read(&self.resolv_conf)? else {
            return Ok(false);
        };
        if current.starts_with(MARKER.as_bytes()) {
            return Ok(true);
        }
        // Only a file that is written in place can be torn: then it is the beginning of something.
        let torn = self.record()? == Some(Record::InPlace)
            && (MARKER.as_bytes().starts_with(&current)
                || read(&self.previous())?.is_some_and(|before| before.starts_with(&current)));
        Ok(torn)
    }

    fn record(&self) -> anyhow::Result<Option<Record>> {
        let Some(bytes) = read(&self.record_path())? else {
            return Ok(None);
        };
        let text = String::from_utf8_lossy(&bytes);
        let words: Vec<&str> = text.split_ascii_whitespace().collect();
        Ok(match words.as_slice() {
            ["replaced"] => Some(Record::Replaced),
            ["created"] => Some(Record::Created),
            ["in-place"] => Some(Record::InPlace),
            ["resolved", interface] => Some(Record::Resolved {
                interface: (*interface).to_owned(),
            }),
            ["resolvconf", source] => Some(Record::Resolvconf {
                source: (*source).to_owned(),
            }),
            _ => bail!("{} is damaged: remove it", self.record_path().display()),
        })
    }

    fn put_record(&self, record: &Record) -> anyhow::Result<()> {
        let text = match record {
            Record::Replaced => "replaced\n".to_owned(),
            Record::Created => "created\n".to_owned(),
            Record::InPlace => "in-place\n".to_owned(),
            Record::Resolved { interface } => format!("resolved {interface}\n"),
            Record::Resolvconf { source } => format!("resolvconf {source}\n"),
        };
        write_durably(&self.record_path(), text.as_bytes())
    }

    /// The helper that serves and the one that was called to restore take turns.
    fn lock(&self) -> anyhow::Result<File> {
        let context = || format!("use the state folder {}", self.state.display());
        fs::create_dir_all(&self.state).with_context(context)?;
        let lock = File::create(self.state.join("lock")).with_context(context)?;
        lock.lock().with_context(context)?;
        Ok(lock)
    }

    fn record_path(&self) -> PathBuf {
        self.state.join("record")
    }

    /// The bytes that the host's file held.
    fn previous(&self) -> PathBuf {
        self.state.join("previous")
    }

    /// What systemd-resolved was told last, and of which device.
    fn told(&self) -> PathBuf {
        self.state.join("told")
    }

    /// The second name of the host's own file.
    fn kept(&self) -> PathBuf {
        self.beside("before-mesh")
    }

    fn beside(&self, suffix: &str) -> PathBuf {
        let mut name = self.resolv_conf.clone().into_os_string();
        name.push(".");
        name.push(suffix);
        name.into()
    }
}

#[cfg(test)]
mod tests;
