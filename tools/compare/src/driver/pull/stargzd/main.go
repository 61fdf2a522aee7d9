// The daemon of stargz-snapshotter, which Debian's package of that name leaves out, made of Debian's
// library of the same version: what upstream's containerd-stargz-grpc does with its default settings,
// without keychains (its registry resolver needs an API of Kubernetes that Debian does not have).
package main

import (
	"context"
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/contrib/snapshotservice"
	"github.com/containerd/containerd/reference"
	"github.com/containerd/containerd/remotes/docker"
	"github.com/containerd/stargz-snapshotter/fs"
	"github.com/containerd/stargz-snapshotter/fs/config"
	"github.com/containerd/stargz-snapshotter/fs/layer"
	"github.com/containerd/stargz-snapshotter/fs/source"
	"github.com/containerd/stargz-snapshotter/snapshot"
	"github.com/hashicorp/go-retryablehttp"
	"github.com/pelletier/go-toml"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
)

func main() {
	address := flag.String("address", "", "unix socket to serve the snapshots API on")
	root := flag.String("root", "", "directory of the snapshots")
	flag.Parse()
	if err := serve(*address, *root); err != nil {
		fmt.Fprintln(os.Stderr, "stargzd:", err)
		os.Exit(1)
	}
}

// The registry of a reference, over plain http.
func hosts(spec reference.Spec) ([]docker.RegistryHost, error) {
	client := retryablehttp.NewClient()
	client.Logger = nil
	return []docker.RegistryHost{{
		Client:       client.StandardClient(),
		Host:         spec.Hostname(),
		Scheme:       "http",
		Path:         "/v2",
		Capabilities: docker.HostCapabilityPull | docker.HostCapabilityResolve,
	}}, nil
}

func serve(address, root string) error {
	// What upstream reads of a file that is not there: some settings have a default of their own.
	none, err := toml.Load("")
	if err != nil {
		return err
	}
	var settings config.Config
	if err := none.Unmarshal(&settings); err != nil {
		return err
	}
	filesystem, err := fs.NewFilesystem(filepath.Join(root, "stargz"), settings,
		fs.WithGetSources(source.FromDefaultLabels(hosts)),
		fs.WithOverlayOpaqueType(layer.OverlayOpaqueTrusted))
	if err != nil {
		return err
	}
	snapshotter, err := snapshot.NewSnapshotter(context.Background(), filepath.Join(root, "snapshotter"),
		filesystem, snapshot.AsynchronousRemove)
	if err != nil {
		return err
	}
	// Its mounts end with it.
	defer snapshotter.Close()
	listener, err := net.Listen("unix", address)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(snapshotter))
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, unix.SIGTERM, unix.SIGINT)
	go func() {
		<-ended
		server.Stop()
	}()
	return server.Serve(listener)
}
