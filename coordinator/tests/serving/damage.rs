//! Database files that are not what they were: refused with a hint, or harmless; never emptier.

use std::fs;
use std::path::Path;

use coordinator::state_dir::StateDir;
use coordinator::store::{Loaded, OpenError, Store};

use crate::support::{Coordinator, settings};

/// A state directory with some life in it, the coordinator stopped.
async fn lived_in() -> (Coordinator, Loaded) {
    let mut coordinator = Coordinator::start().await;
    let secret = coordinator.key(true).await;
    for n in 0..12 {
        coordinator.agent(&secret, &format!("node{n}")).await;
    }
    coordinator.set_policy(r#"{"acls": []}"#).await.unwrap();
    coordinator.stop().await;
    let loaded = open(&coordinator.state("")).await.unwrap();
    (coordinator, loaded)
}

/// Opens as a start does; founding a mesh here would be the worst answer of all.
async fn open(dir: &Path) -> Result<Loaded, OpenError> {
    let state = StateDir::open(dir).map_err(OpenError::StateDir)?;
    let (store, loaded) = Store::open(&state, || panic!("taken for a new instance")).await?;
    store.close().await.unwrap();
    Ok(loaded)
}

fn same(found: &Loaded, expected: &Loaded) -> bool {
    found.nodes == expected.nodes
        && found.users == expected.users
        && found.keys == expected.keys
        && found.policy == expected.policy
        && found.generation == expected.generation
}

/// As after a `kill -9`: nobody vouches for the file's every bit.
fn break_seal(dir: &Path) {
    let text = fs::read_to_string(dir.join("head")).unwrap();
    let seal = text.split(' ').nth(3).unwrap();
    fs::write(dir.join("head"), text.replace(seal, &"-".repeat(64))).unwrap();
}

fn put(dir: &Path, database: &[u8]) {
    for side in ["coordinator.db-wal", "coordinator.db-shm"] {
        drop(fs::remove_file(dir.join(side)));
    }
    fs::write(dir.join("coordinator.db"), database).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_truncated_or_absent_database_is_refused_with_a_hint() {
    let (coordinator, _) = lived_in().await;
    let dir = coordinator.state("");
    let good = fs::read(dir.join("coordinator.db")).unwrap();
    for sealed in [true, false] {
        if !sealed {
            break_seal(&dir);
        }
        for length in [0, 1, 99, 100, 4096, good.len() / 2, good.len() - 1] {
            put(&dir, &good[..length]);
            let error = open(&dir).await.unwrap_err();
            assert!(error.restore_hint().is_some(), "cut to {length}: {error}");
        }
    }
    fs::remove_file(dir.join("coordinator.db")).unwrap();
    assert!(matches!(open(&dir).await, Err(OpenError::Missing(_))));
    put(&dir, &good);
    fs::remove_file(dir.join("instance")).unwrap();
    assert!(matches!(open(&dir).await, Err(OpenError::Foreign(_))));
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_clean_stop_any_flipped_bit_is_refused() {
    let (coordinator, _) = lived_in().await;
    let dir = coordinator.state("");
    let good = fs::read(dir.join("coordinator.db")).unwrap();
    for at in (0..good.len()).step_by(4001) {
        let mut bytes = good.clone();
        bytes[at] ^= 1 << (at % 8);
        put(&dir, &bytes);
        let error = open(&dir).await.unwrap_err();
        assert!(error.restore_hint().is_some(), "byte {at}: {error}");
    }
    put(&dir, &good);
    open(&dir).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_crash_a_flipped_bit_is_refused_or_changes_nothing() {
    let (coordinator, expected) = lived_in().await;
    let dir = coordinator.state("");
    break_seal(&dir);
    let good = fs::read(dir.join("coordinator.db")).unwrap();
    let (mut refused, mut harmless) = (0, 0);
    for at in (0..good.len()).step_by(173) {
        let mut bytes = good.clone();
        bytes[at] ^= 1 << (at % 8);
        put(&dir, &bytes);
        match open(&dir).await {
            Ok(loaded) => {
                assert!(same(&loaded, &expected), "byte {at} changed the world");
                harmless += 1;
            }
            Err(_) => refused += 1,
        }
    }
    eprintln!("flipped bits: {refused} refused, {harmless} harmless");
    assert!(refused > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_or_lost_log_never_takes_back_what_was_acknowledged() {
    let coordinator = Coordinator::start().await;
    let secret = coordinator.key(true).await;
    for n in 0..6 {
        coordinator.agent(&secret, &format!("node{n}")).await;
    }
    // What a crash at this moment would leave.
    let crashed = tempfile::tempdir().unwrap();
    let files = ["coordinator.db", "coordinator.db-wal", "head", "instance"];
    let bytes = files.map(|file| fs::read(coordinator.state(file)).unwrap());
    let lay = |log: &[u8]| {
        drop(fs::remove_file(crashed.path().join("coordinator.db-shm")));
        for (file, bytes) in files.iter().zip(&bytes) {
            fs::write(crashed.path().join(file), bytes).unwrap();
        }
        fs::write(crashed.path().join("coordinator.db-wal"), log).unwrap();
    };
    let log = &bytes[1];
    lay(log);
    let expected = open(crashed.path()).await.unwrap();
    assert_eq!(expected.nodes.len(), 6);

    lay(&[]);
    assert!(open(crashed.path()).await.is_err());
    for at in (0..log.len()).step_by(1009) {
        let mut flipped = log.clone();
        flipped[at] ^= 1 << (at % 8);
        for damaged in [&flipped[..], &log[..at]] {
            lay(damaged);
            if let Ok(loaded) = open(crashed.path()).await {
                assert!(same(&loaded, &expected), "byte {at} of the log");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_another_mesh_and_a_file_of_something_else_are_refused() {
    let (mine, _) = lived_in().await;
    let (other, _) = lived_in().await;
    let dir = mine.state("");
    break_seal(&dir);
    put(&dir, &fs::read(other.state("coordinator.db")).unwrap());
    assert!(matches!(open(&dir).await, Err(OpenError::OtherMesh { .. })));

    let foreign = mine.dir.path().join("foreign.db");
    let options = sqlx::sqlite::SqliteConnectOptions::new()
        .filename(&foreign)
        .create_if_missing(true);
    let mut connection = sqlx::ConnectOptions::connect(&options).await.unwrap();
    sqlx::raw_sql("CREATE TABLE node (id INTEGER)")
        .execute(&mut connection)
        .await
        .unwrap();
    sqlx::Connection::close(connection).await.unwrap();
    put(&dir, &fs::read(&foreign).unwrap());
    assert!(matches!(open(&dir).await, Err(OpenError::Damaged { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_somebody_edited_are_refused() {
    let (coordinator, _) = lived_in().await;
    let dir = coordinator.state("");
    break_seal(&dir);
    let good = fs::read(dir.join("coordinator.db")).unwrap();
    for statement in [
        "UPDATE node SET name = 'gateway' WHERE id = (SELECT max(id) FROM node)",
        "DELETE FROM node WHERE id = (SELECT max(id) FROM node)",
        "DELETE FROM policy",
        "UPDATE auth_key SET uses = 0, revoked = 0",
        "UPDATE auth_key SET reusable = 0",
        "DELETE FROM instance",
        "UPDATE instance SET generation = generation + 1",
        "DROP TABLE node",
    ] {
        put(&dir, &good);
        let options =
            sqlx::sqlite::SqliteConnectOptions::new().filename(dir.join("coordinator.db"));
        let mut connection = sqlx::ConnectOptions::connect(&options).await.unwrap();
        sqlx::raw_sql(statement)
            .execute(&mut connection)
            .await
            .unwrap();
        sqlx::Connection::close(connection).await.unwrap();
        let error = open(&dir).await.unwrap_err();
        assert!(error.restore_hint().is_some(), "{statement}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_key_and_the_fixed_settings_are_held_to() {
    let (mut coordinator, _) = lived_in().await;
    let refused = |settings| async {
        let config = coordinator::config::Config::new(settings).unwrap();
        format!("{:#}", coordinator::app::start(config).await.unwrap_err())
    };
    let mut other = settings(coordinator.dir.path());
    other.domain = Some("other.internal".to_owned());
    assert!(
        refused(other)
            .await
            .contains("mesh.internal since its first start")
    );
    let mut other = settings(coordinator.dir.path());
    other.pool_v4 = Some("10.0.0.0/16".parse().unwrap());
    assert!(
        refused(other)
            .await
            .contains("100.64.0.0/10 since its first start")
    );

    let key = fs::read(coordinator.state("coordinator.key")).unwrap();
    fs::remove_file(coordinator.state("coordinator.key")).unwrap();
    let gone = refused(settings(coordinator.dir.path())).await;
    assert!(gone.contains("put it back from your copy"), "{gone}");
    fs::write(coordinator.state("coordinator.key"), "ab".repeat(32)).unwrap();
    drop(fs::set_permissions(
        coordinator.state("coordinator.key"),
        std::os::unix::fs::PermissionsExt::from_mode(0o600),
    ));
    let foreign = refused(settings(coordinator.dir.path())).await;
    assert!(foreign.contains("put the right one back"), "{foreign}");
    fs::write(coordinator.state("coordinator.key"), key).unwrap();
    coordinator.launch().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_is_in_the_database() {
    let mut coordinator = Coordinator::start().await;
    let secret = coordinator.key(false).await;
    coordinator.stop().await;
    let bytes = fs::read(coordinator.state("coordinator.db")).unwrap();
    let key = fs::read_to_string(coordinator.state("coordinator.key")).unwrap();
    let random = secret.rsplit('_').next().unwrap();
    for needle in [
        random.as_bytes(),
        &hex::decode(random).unwrap(),
        key.trim().as_bytes(),
    ] {
        assert!(!bytes.windows(needle.len()).any(|window| window == needle));
    }
}
