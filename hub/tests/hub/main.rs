//! Checkpoints by name, against a server that speaks the hub's routes.
#![allow(clippy::unwrap_used)]

mod server;

use std::fs;
use std::path::{Path, PathBuf};

use server::Server;
use specattn_hub::{HubError, Settings, Wanted, folder_with};
use tempfile::TempDir;

const NAME: &str = "acme/tiny";

/// A hub with one checkpoint in two shards, and an empty cache.
struct World {
    hub: Server,
    home: TempDir,
}

impl World {
    fn new() -> Self {
        let index = r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#;
        let hub = Server::start();
        for (file, content) in [
            ("config.json", b"{}".to_vec()),
            ("tokenizer.json", b"{\"model\": 1}".to_vec()),
            ("model.safetensors.index.json", index.as_bytes().to_vec()),
            ("model-1.safetensors", vec![7; 300_000]),
            ("model-2.safetensors", vec![8; 1_000]),
            ("README.md", b"not needed".to_vec()),
            ("pytorch_model.bin", vec![9; 1_000]),
        ] {
            hub.put(file, content);
        }
        let home = tempfile::tempdir().unwrap();
        Self { hub, home }
    }

    fn settings(&self) -> Settings {
        Settings {
            endpoint: Some(self.hub.url()),
            cache: Some(self.home.path().join("hub")),
            quiet: true,
            ..Settings::default()
        }
    }

    fn offline(&self) -> Settings {
        Settings {
            offline: true,
            ..self.settings()
        }
    }

    fn get(&self, name: &str, settings: &Settings) -> Result<PathBuf, HubError> {
        folder_with(Path::new(name), Wanted::Checkpoint, settings)
    }

    /// Files of the whole cache that are neither links nor pointers.
    fn blobs(&self) -> usize {
        let blobs = self.home.path().join("hub/models--acme--tiny/blobs");
        let entries = fs::read_dir(blobs).map(|entries| entries.flatten().collect());
        let entries: Vec<_> = entries.unwrap_or_default();
        let of_files = entries
            .iter()
            .filter(|entry| entry.path().extension().is_none());
        of_files.count()
    }
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap().flatten();
    let mut names: Vec<_> = entries
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_name_becomes_a_folder_with_what_a_checkpoint_needs() {
    let world = World::new();
    let folder = world.get(NAME, &world.settings()).unwrap();
    let wanted = [
        "config.json",
        "model-1.safetensors",
        "model-2.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ];
    assert_eq!(names(&folder), wanted);
    assert_eq!(fs::read(folder.join(wanted[1])).unwrap(), vec![7; 300_000]);
    assert!(folder.ends_with(format!("models--acme--tiny/snapshots/{}", server::COMMIT)));

    // The second time nothing but the listing is asked for, and without the hub nothing at all.
    let asked = world.hub.asked();
    assert_eq!(world.get(NAME, &world.settings()).unwrap(), folder);
    assert_eq!(world.hub.asked(), asked + 1);
    assert_eq!(world.get(NAME, &world.offline()).unwrap(), folder);
    assert_eq!(world.hub.asked(), asked + 1);
    // A hub that is out of reach is no reason to stop.
    world.hub.stop();
    assert_eq!(world.get(NAME, &world.settings()).unwrap(), folder);
}

#[test]
fn a_revision_is_pinned() {
    let world = World::new();
    world.hub.tag("v1.0");
    for revision in ["v1.0", server::COMMIT] {
        let name = format!("{NAME}@{revision}");
        let folder = world.get(&name, &world.settings()).unwrap();
        assert_eq!(world.get(&name, &world.offline()).unwrap(), folder);
    }
    let missing = world.get(&format!("{NAME}@v2.0"), &world.settings());
    assert!(
        matches!(missing, Err(HubError::NotFound { .. })),
        "{missing:?}"
    );
}

#[test]
fn a_gateway_takes_the_tokenizer_alone() {
    let world = World::new();
    let folder = folder_with(Path::new(NAME), Wanted::Tokenizer, &world.settings()).unwrap();
    assert_eq!(names(&folder), ["tokenizer.json"]);
    // That is no whole checkpoint.
    let offline = world.get(NAME, &world.offline());
    assert!(
        matches!(offline, Err(HubError::Offline { .. })),
        "{offline:?}"
    );
}

#[test]
fn a_transfer_that_breaks_off_goes_on() {
    let world = World::new();
    world.hub.break_after(100_000);
    let folder = world.get(NAME, &world.settings()).unwrap();
    let file = fs::read(folder.join("model-1.safetensors")).unwrap();
    assert_eq!(file, vec![7; 300_000]);
    let ranges = world.hub.ranges("model-1.safetensors");
    assert!(ranges.iter().any(|start| *start > 0), "{ranges:?}");

    // What an earlier process left is taken up too.
    let world = World::new();
    let blobs = world.home.path().join("hub/models--acme--tiny/blobs");
    fs::create_dir_all(&blobs).unwrap();
    let etag = server::etag("model-1.safetensors");
    fs::write(blobs.join(format!("{etag}.part")), vec![7; 50_000]).unwrap();
    let folder = world.get(NAME, &world.settings()).unwrap();
    assert_eq!(world.hub.ranges("model-1.safetensors"), [50_000]);
    let file = fs::read(folder.join("model-1.safetensors")).unwrap();
    assert_eq!(file, vec![7; 300_000]);
}

#[test]
fn a_file_that_was_cut_is_fetched_again() {
    let world = World::new();
    let folder = world.get(NAME, &world.settings()).unwrap();
    let path = folder.join("model-2.safetensors");
    fs::write(&path, b"cut").unwrap();
    world.get(NAME, &world.settings()).unwrap();
    assert_eq!(fs::read(&path).unwrap(), vec![8; 1_000]);
    assert_eq!(world.blobs(), 5);
}

#[test]
fn refusals_say_why() {
    let world = World::new();
    let unknown = world.get("acme/nothing", &world.settings()).unwrap_err();
    assert!(matches!(unknown, HubError::NotFound { .. }), "{unknown}");

    world.hub.want_token("hf_right");
    let refused = world.get(NAME, &world.settings()).unwrap_err();
    assert!(
        matches!(refused, HubError::Refused { status: 401, .. }),
        "{refused}"
    );
    assert!(refused.to_string().contains("HF_TOKEN"), "{refused}");
    let with_token = |token: &str| Settings {
        token: Some(token.to_owned()),
        ..world.settings()
    };
    let wrong = world.get(NAME, &with_token("hf_wrong")).unwrap_err();
    assert!(matches!(wrong, HubError::Refused { .. }), "{wrong}");
    assert!(!wrong.to_string().contains("hf_wrong"), "{wrong}");
    world.get(NAME, &with_token("hf_right")).unwrap();

    let world = World::new();
    let offline = world.get(NAME, &world.offline()).unwrap_err();
    assert!(matches!(offline, HubError::Offline { .. }), "{offline}");
    assert_eq!(world.hub.asked(), 0);

    world.hub.stop();
    let gone = world.get(NAME, &world.settings()).unwrap_err();
    assert!(matches!(gone, HubError::Unavailable { .. }), "{gone}");
}

#[test]
fn what_cannot_be_run_is_named() {
    let world = World::new();
    world.hub.remove("model-2.safetensors");
    let error = world.get(NAME, &world.settings()).unwrap_err();
    assert!(error.to_string().contains("model-2.safetensors"), "{error}");

    world.hub.remove("model.safetensors.index.json");
    let error = world.get(NAME, &world.settings()).unwrap_err();
    assert!(error.to_string().contains("no weights"), "{error}");

    world.hub.remove("tokenizer.json");
    let error = world.get(NAME, &world.settings()).unwrap_err();
    assert!(matches!(error, HubError::NoCheckpoint { .. }), "{error}");
}

#[test]
fn a_hub_that_lies_is_refused() {
    // A path that leaves the repository.
    let world = World::new();
    world.hub.put("../../evil", vec![1]);
    let error = world.get(NAME, &world.settings()).unwrap_err();
    assert!(matches!(error, HubError::Untrusted { .. }), "{error}");

    // A shard that leaves it.
    let world = World::new();
    let index = br#"{"weight_map": {"a": "../../../evil.safetensors"}}"#;
    world
        .hub
        .put("model.safetensors.index.json", index.to_vec());
    let error = world.get(NAME, &world.settings()).unwrap_err();
    assert!(matches!(error, HubError::NoCheckpoint { .. }), "{error}");

    // A file of another length than the listing tells.
    let world = World::new();
    world.hub.announce("model-2.safetensors", 999);
    let error = world.get(NAME, &world.settings()).unwrap_err();
    assert!(matches!(error, HubError::Untrusted { .. }), "{error}");

    // A commit that is a path.
    let world = World::new();
    world.hub.say_commit("../../../evil");
    let error = world.get(NAME, &world.settings()).unwrap_err();
    assert!(matches!(error, HubError::Untrusted { .. }), "{error}");

    // Nothing of it counts as a snapshot.
    assert!(world.get(NAME, &world.offline()).is_err());
    let evil = world.home.path().parent().unwrap().join("evil");
    assert!(!evil.exists());
}

#[test]
fn folders_stay_folders() {
    let world = World::new();
    let folder = world.home.path().to_owned();
    let same = folder_with(&folder, Wanted::Checkpoint, &world.settings()).unwrap();
    assert_eq!(same, folder);
    // Neither a folder nor a name: whoever opens it says so.
    let missing = Path::new("/nowhere/models/target");
    let same = folder_with(missing, Wanted::Checkpoint, &world.settings()).unwrap();
    assert_eq!(same, missing);
    assert_eq!(world.hub.asked(), 0);
}
