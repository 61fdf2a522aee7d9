//go:build !containerd2
// +build !containerd2

package suite

import (
	"context"

	"github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/namespaces"
	root "github.com/containerd/containerd/snapshots"
	"github.com/containerd/containerd/snapshots/proxy"
	"github.com/containerd/containerd/snapshots/testsuite"
	"google.golang.org/grpc"
)

// Where containerd 1 keeps what the tests need.

type snapshotter = root.Snapshotter

var (
	runSuite      = testsuite.SnapshotterSuite
	withNamespace = namespaces.WithNamespace
)

func newClient(conn *grpc.ClientConn, name string) snapshotter {
	return proxy.NewSnapshotter(snapshots.NewSnapshotsClient(conn), name)
}

func (d *daemon) keys(ctx context.Context) (keys []string, err error) {
	err = d.client.Walk(ctx, func(_ context.Context, info root.Info) error {
		keys = append(keys, info.Name)
		return nil
	})
	return
}
